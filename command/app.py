"""The `reverie` command: which commands there are, and how they end.

    0  ok
    1  a refusal, of the server or of a value: the line on stderr names it and the remedy
    2  the command line itself is wrong
    3  no server answers, or it is not ready
    130  Ctrl-C

Every command is in the file of its noun. Nothing here, or imported from here, imports torch, Ray or
vLLM before a command needs it.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.errors import ReverieError
from command import output
from command.candidates import candidates
from command.chat import chat
from command.checkpoints import checkpoints, forget, history, rollback, show, verify
from command.client import Server, Unreachable
from command.doctor import doctor
from command.down import down
from command.dreams import behaviours, dream, memories
from command.jobs import jobs
from command.keys import keys
from command.logs import logs
from command.mirror import mirror, restore
from command.options import DEFAULT_PORT, Json, Port
from command.output import Output, plain
from command.runs import runs
from command.status import status
from command.submit import submit
from command.train import train
from command.up import up

REFUSED, UNREACHABLE = 1, 3

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


def demo(
    port: Port = DEFAULT_PORT,
    picture: Annotated[Path | None, typer.Option(help="Also draw it, as this SVG file.")] = None,
    is_json: Json = False,
) -> None:
    """Teach a running server one answer and show the proof: versions, gaps, and one copy."""
    from command.demo import run

    printed, server = Output(is_json), Server(port)
    printed.show(run(server.base, server.key, lambda text: printed.say(plain(text)), picture))


@cli.callback()
def reverie(
    context: typer.Context,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw what the command prints, as this SVG file.")
    ] = None,
) -> None:
    """Serve a language model and keep teaching it while it answers.

    Exit codes: 0 ok, 1 refused, 2 wrong command line, 3 no server answers or it is not ready.
    A key for a door that needs one: REVERIE_KEY, or a file named by REVERIE_KEY_FILE.
    """
    if picture is not None:
        context.with_resource(output.drawn(picture, f"reverie {context.invoked_subcommand}"))


PANELS: dict[str, tuple[tuple[str, Any], ...]] = {
    "Run a cell": (
        ("up", up),
        ("down", down),
        ("status", status),
        ("chat", chat),
        ("demo", demo),
    ),
    "Teach it": (
        ("train", train),
        ("jobs", jobs),
        ("candidates", candidates),
        ("dream", dream),
        ("behaviours", behaviours),
        ("memories", memories),
    ),
    "Keep and undo": (
        ("checkpoints", checkpoints),
        ("rollback", rollback),
        ("forget", forget),
        ("mirror", mirror),
        ("restore", restore),
    ),
    "Operate it": (
        ("doctor", doctor),
        ("logs", logs),
        ("submit", submit),
        ("runs", runs),
        ("keys", keys),
    ),
}
OLD_NAMES: dict[str, Any] = {"history": history, "show": show, "verify": verify}
"""What is now below `checkpoints`."""

for panel, commands in PANELS.items():
    for name, command in commands:
        if isinstance(command, typer.Typer):
            cli.add_typer(command, name=name, rich_help_panel=panel)
        else:
            cli.command(name, rich_help_panel=panel)(command)
for name, command in OLD_NAMES.items():
    cli.command(name, hidden=True)(command)


def main() -> None:
    """Entry point: a refusal is one line on stderr, and its exit code."""
    try:
        cli()
    except Unreachable as error:
        output.fail(error)
        sys.exit(UNREACHABLE)
    except ReverieError as error:
        output.fail(error)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
