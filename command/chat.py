"""`reverie chat`: talk to the model, correct it, and see it learn.

    > What is your name?
    v12  I am an AI language model.
    > /teach My name is Reverie.
    learned: loss 3.45 to 0.0004 in 12 steps, version 12 to 24
    > /again
    v24  My name is Reverie.

Lines come from the keyboard or from a pipe. Ctrl-C stops an answer, Ctrl-D leaves.
"""

import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from actors.errors import ReverieError, SettingsError
from actors.home import default_home
from command.asking import Answer, Model
from command.checkpoints import told_of
from command.client import Server
from command.flow import Flow
from command.jobs import progress_of, require_done, until_ended
from command.options import DEFAULT_PORT, Json, Port
from command.output import Output, plain

EPOCHS: Final = 12
LEARNING_RATE: Final = 2e-5
WARMUP_STEPS: Final = 5
"""What one correction takes with the default model: the loss of its answer goes to nearly 0."""
MAX_HISTORY_LINES: Final = 1000
HELP: Final = """\
[bold]/teach[/] TEXT    what the last answer should have been: learned, with its progress
[bold]/again[/]         ask the last question again, of the weights as they are now
[bold]/forget[/]        undo the last /teach: as if it had never been learned
[bold]/system[/] TEXT   an instruction for all that follows; without TEXT there is none
[bold]/reset[/]         begin anew; the instruction stays
[bold]/help[/]          this; a question that begins with / is written with //
[bold]/exit[/]          or Ctrl-D; Ctrl-C stops an answer"""


def chat(
    question: Annotated[
        str | None, typer.Argument(help="Ask this and end; left out: a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="An instruction to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 gives the likeliest answer.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Of a correction.")] = EPOCHS,
    lr: Annotated[float, typer.Option(help="Of a correction.")] = LEARNING_RATE,
    port: Port = DEFAULT_PORT,
    is_json: Json = False,
) -> None:
    """Talk to the model, with the weights' version beside each answer; /teach corrects it."""
    output = Output(is_json)
    options = {"max_tokens": max_tokens, "temperature": temperature}
    training = {"epochs": epochs, "learning_rate": lr, "warmup_steps": WARMUP_STEPS}
    made = Chat(Server(port), output, options, training)
    made.system = system
    is_person = question is None and sys.stdin.isatty()
    if is_person:
        output.say(f"[dim]{made.model.name} on port {port}; /help, Ctrl-D leaves[/]")
    made.run([question] if question is not None else lines(default_home()), is_person)
    output.show({"model": made.model.name, "turns": made.turns})


class Chat:
    """One conversation, and what is taught in it."""

    def __init__(
        self, server: Server, output: Output, options: dict[str, Any], training: dict[str, Any]
    ) -> None:
        self._server, self._output = server, output
        self._options, self._training = options, training
        self.model = Model(server)
        self.system: str | None = None
        self.turns: list[dict[str, Any]] = []
        """Everything that was asked and taught, in order, for --json."""
        self._messages: list[dict[str, Any]] = []
        self._taught: list[str] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/teach": self.teach,
            "/again": self.again,
            "/forget": self.forget,
            "/system": self.instruct,
            "/reset": self.reset,
            "/help": lambda text: output.say(HELP),
        }

    def run(self, asked: Iterator[str] | list[str], is_person: bool) -> None:
        """Take line after line; what is refused ends a pipe and not a person's conversation."""
        for line in asked:
            word, _, text = line.strip().partition(" ")
            if word in ("/exit", "/quit"):
                return
            if not is_person and self._output.console.record:
                self._output.say(f"[bold cyan]>[/] {plain(line.strip())}")
            try:
                self._take(word, text.strip(), line.strip())
            except KeyboardInterrupt:
                self._output.note("stopped")
                if not is_person:
                    raise
            except ReverieError as error:
                if not is_person:
                    raise
                self._output.errors.print(f"[red]{plain(str(error))}[/]")

    def _take(self, word: str, text: str, line: str) -> None:
        if not line:
            return
        if word.startswith("//"):
            self.ask(line[1:])
        elif not word.startswith("/"):
            self.ask(line)
        elif word in self._commands:
            self._commands[word](text)
        else:
            raise SettingsError(f"{word}: unknown; /help lists them, // begins a question with /")

    # What a line may do.

    def ask(self, question: str) -> None:
        """Ask, and show the answer as it comes; Ctrl-C keeps what has come of it."""
        self._messages.append({"role": "user", "content": question})
        answer, said = Answer(), False
        try:
            said = self._stream(answer)
        finally:
            if said or answer.text:
                self._messages.append({"role": "assistant", "content": answer.text})
                self.turns.append({"question": question, **answer.as_json()})
            else:
                self._messages.pop()

    def _stream(self, answer: Answer) -> bool:
        output = self._output
        pieces = self.model.ask(self._view(), answer, **self._options)
        flow = None
        with contextlib.closing(pieces):
            try:
                for piece in pieces:
                    flow = flow or self._begin(answer)
                    if flow is not None:
                        flow.add(piece)
            finally:
                flow = flow or (self._begin(answer) if answer.finish else None)
                if flow is not None:
                    flow.end(_note(answer))
        output.console.file.flush()
        return True

    def _begin(self, answer: Answer) -> Flow | None:
        output = self._output
        if output.is_json:
            return None
        head = f"v{answer.first_version}"
        output.console.print(f"[dim]{head}[/]  ", end="")
        is_laid_out = output.console.is_terminal or output.console.record
        width = output.prose_width if is_laid_out else None
        return Flow(output.console, len(head) + 2, width)

    def again(self, text: str) -> None:
        """Ask the last question again, in the same conversation."""
        question = self._last_question()
        asked = str(self._messages[question]["content"])
        del self._messages[question:]
        self.ask(asked)

    def teach(self, text: str) -> None:
        """Have `text` learned as the answer to the last question, and wait for it."""
        if not text:
            raise SettingsError("/teach: say what the answer should have been: /teach TEXT")
        question = self._last_question()
        right = {"role": "assistant", "content": text}
        sample = {
            "messages": [*self._view(question + 1), right],
            "id": f"chat-{secrets.token_hex(6)}",
            "source": "reverie chat",
        }
        body = {"samples": [sample], "config": self._training}
        job_id = self._server.post("/train", body)["job_id"]
        try:
            with self._output.steps() as progress:
                job = until_ended(self._server, job_id, progress)
        except KeyboardInterrupt:
            self._output.say(f"it goes on: 'reverie jobs follow {job_id}'")
            return
        require_done(job)
        self._messages[question + 1 :] = [right]
        self._taught.append(str(sample["id"]))
        self.turns.append({"taught": text, "id": sample["id"], "job": job})
        self._output.say(f"[green]learned[/]  {progress_of(job)}  [dim]/again asks again[/]")

    def forget(self, text: str) -> None:
        """Undo the last `/teach`."""
        if not self._taught:
            raise SettingsError("/forget: nothing was taught here; see 'reverie forget' for others")
        with self._output.waiting("forgetting"):
            done = self._server.post("/forget", {"item": self._taught[-1]})
        told = told_of(self._taught.pop(), done)
        self.turns.append({"forgot": done})
        self._output.say(plain(told))

    def instruct(self, text: str) -> None:
        """Set the instruction, or remove it."""
        self.system = text or None
        self._output.note("the instruction is set" if text else "there is no instruction")

    def reset(self, text: str) -> None:
        """Begin a new conversation."""
        self._messages.clear()
        self._output.note("a new conversation")

    def _view(self, end: int | None = None) -> list[dict[str, Any]]:
        """What the model is to read: the instruction, and the messages before `end`."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self._messages[:end]

    def _last_question(self) -> int:
        asked = [at for at, each in enumerate(self._messages) if each["role"] == "user"]
        if not asked:
            raise SettingsError("nothing was asked yet; ask first")
        return asked[-1]


def _note(answer: Answer) -> str:
    """What is to be said of an answer beside its text."""
    parts = []
    if answer.last_version is not None and answer.last_version != answer.first_version:
        parts.append(f"to v{answer.last_version}")
    if answer.finish is None:
        parts.append("cut off")
    elif answer.finish == "length":
        parts.append("cut at --max-tokens")
    return f"({', '.join(parts)})" if parts else ""


def lines(home: Path) -> Iterator[str]:
    """What is typed, with its history between sessions, or what comes through a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with typed_before(home / "chat_history"):
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nCtrl-D or /exit leaves")


@contextlib.contextmanager
def typed_before(path: Path) -> Iterator[None]:
    """Line editing, with the lines of earlier sessions; a file that only its owner reads."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(MAX_HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            readline.write_history_file(path)
