"""`reverie candidates`: answers that an instruction made, to be learned without it, or not."""

from typing import Annotated, Any, Final

import typer
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel

from actors.errors import ReverieError, SettingsError
from command.client import Server
from command.options import DEFAULT_PORT, Json, Port
from command.output import Output, plain, table, when

STATES: Final = ("proposed", "approved", "rejected", "trained")
SHORT_CHARS: Final = 60

candidates = typer.Typer(help="What was said and may be learned: list, show, approve, reject.")


def known_candidates(incomplete: str) -> list[str]:
    """For completion: those of a running cell, or none."""
    try:
        found = Server(DEFAULT_PORT).get("/candidates", timeout_s=2)["data"]
    except ReverieError:
        return []
    return [each["id"] for each in found if each["id"].startswith(incomplete)]


Candidate = Annotated[
    str, typer.Argument(help="One of 'reverie candidates'.", autocompletion=known_candidates)
]
Several = Annotated[
    list[str], typer.Argument(help="Of 'reverie candidates'.", autocompletion=known_candidates)
]


@candidates.callback(invoke_without_command=True)
def default(context: typer.Context, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_(None, port, is_json)


@candidates.command("list")
def list_(
    state: Annotated[str | None, typer.Option(help=f"Only {', '.join(STATES)}.")] = None,
    port: Port = DEFAULT_PORT,
    is_json: Json = False,
) -> None:
    """The newest first, with how much the instruction made of the answer."""
    output = Output(is_json)
    if state is not None and state not in STATES:
        raise SettingsError(f"--state {state!r}: choose {', '.join(STATES)}").about("state")
    found = Server(port).get("/candidates" + (f"?state={state}" if state else ""))
    made = table("id", "state", "#nats", "question", "answer", "said")
    for each in found["data"]:
        made.add_row(
            each["id"],
            each["state"],
            f"{each['divergence']:.2f}",
            _short(_question(each)),
            _short(each["answer"]),
            when(each["created"]),
        )
    nothing = "no candidates: see 'What was said' in the README for how chats become some"
    output.show(found, made if found["data"] else nothing)


@candidates.command("show")
def show(candidate: Candidate, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """Both answers side by side: as it was said, and as the model says it uninstructed."""
    output = Output(is_json)
    found = Server(port).get(f"/candidates/{candidate}")
    output.show(found, *_told(found, output.prose_width))


@candidates.command("approve")
def approve(candidate: Several, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """Have them learned, once, without their instructions."""
    _decide(candidate, "approve", port, is_json)


@candidates.command("reject")
def reject(candidate: Several, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """Have them not learned."""
    _decide(candidate, "reject", port, is_json)


def _decide(names: list[str], decision: str, port: int, is_json: bool) -> None:
    output, server = Output(is_json), Server(port)
    made = [server.post(f"/candidates/{name}", {"decision": decision}) for name in names]
    told = [f"{each['id']} is {each['state']}" for each in made]
    output.show({"data": made}, *told)


def _told(found: dict[str, Any], width: int) -> list[RenderableType]:
    half = max(30, width // 2 - 1)
    head = f"[bold]{found['id']}[/]  {found['state']}, {found['divergence']:.2f} nats per token"
    head += f", measured at version {found['weights_version']}"
    asked = [
        f"[dim]{each['role']}{' (instruction)' if each['strip'] else ''}[/]  "
        + plain(each["content"])
        for each in found["turns"]
    ]
    sides = Columns(
        [
            Panel(plain(found["answer"]), title="as instructed", width=half, border_style="green"),
            Panel(plain(found["plain"]), title="without", width=half, border_style="dim"),
        ],
        padding=(0, 1),
    )
    return [head, "", Group(*asked), "", sides]


def _question(found: dict[str, Any]) -> str:
    asked = [each["content"] for each in found["turns"] if each["role"] == "user"]
    return asked[-1] if asked else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return plain(line if len(line) <= SHORT_CHARS else line[: SHORT_CHARS - 3] + "...")
