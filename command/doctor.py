"""`reverie doctor`: whether a cell would run well here, before it is started; changes nothing.

Each line is ok, a warning or an error, with the remedy; an error makes the exit code 1.
"""

import warnings
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from actors.errors import ReverieError
from actors.home import DEFAULT_MODEL, GIB, MIB
from command import machine, memory_plan, version_matrix
from command.finding import Finding, error
from command.memory_plan import Plan
from command.options import DEFAULT_PORT, Json, Port, pairs_of
from command.output import Output, plain, table

if TYPE_CHECKING:
    from actors.settings import Settings

MARKS: Final = {
    "ok": "[green]ok[/]",
    "warning": "[yellow]warning[/]",
    "error": "[bold red]error[/]",
}


def doctor(
    model: Annotated[
        str, typer.Option(help="A directory, a hub id, or the default model's name.")
    ] = DEFAULT_MODEL,
    port: Port = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="Where the door would be.")] = "127.0.0.1",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as for 'reverie up'.")
    ] = None,
    is_json: Json = False,
) -> None:
    """Look at driver, memory, limits, ports, token, versions and disk, before a start."""
    from actors.settings import Settings

    output = Output(is_json)
    pairs: dict[str, Any] = {"model": model, "port": port, "host": host}
    settings = Settings.from_pairs(pairs | pairs_of(set_, "group.key=value"))
    with output.waiting("looking at the machine"):
        findings, plan = examine(settings)
    num_errors = sum(each.level == "error" for each in findings)
    document = {
        "is_well": not num_errors,
        "findings": [each.as_json() for each in findings],
        "memory": None if plan is None else plan.as_json(),
    }
    shown: list[Any] = [_lines(findings)]
    if plan is not None:
        shown += ["", _shares(plan)]
    output.show(document, *shown)
    if num_errors:
        raise typer.Exit(1)


def examine(settings: "Settings") -> tuple[list[Finding], Plan | None]:
    """Everything that can be said before a boot."""
    gpus, _ = machine.gpus()
    findings = [*version_matrix.check(), *machine.driver(settings)]
    plan = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = memory_plan.make_plan(settings, bool(gpus))
    except ReverieError as failed:
        findings.append(error("memory", str(failed), "name another --model"))
    if plan is not None:
        device_bytes = int(gpus[0][2]) * MIB if gpus else None
        findings += memory_plan.check(plan, device_bytes)
        findings += machine.limits(plan.shared_bytes, settings)
    findings += machine.ports(settings)
    findings += machine.token(settings)
    findings += machine.disk(settings.home, plan.disk_bytes if plan is not None else 0)
    findings += machine.programs()
    return findings, plan


def _lines(findings: list[Finding]) -> Table:
    made = Table.grid(padding=(0, 2, 0, 0))
    for each in findings:
        told = plain(each.told)
        if each.remedy:
            told += f"\n[dim]->[/] {plain(each.remedy)}"
        made.add_row(MARKS[each.level], each.check, told)
    return made


def _shares(plan: Plan) -> Table:
    count = f"{plan.num_parameters / 1e6:,.0f} M parameters, {plan.dtype}, {plan.device}"
    made = table("role", "what", "#GiB", "where", title=f"[bold]memory by role[/]  {count}")
    for each in plan.shares:
        where = "GPU" if each.is_on_device else "host"
        passing = ", for a while" if each.is_passing else ""
        made.add_row(each.role, each.what, f"{each.size_bytes / GIB:.2f}", where + passing)
    for where, is_on_device in (("host", False), ("GPU", True)):
        if plan.total(is_on_device):
            made.add_row(
                "[bold]all[/]", "", f"[bold]{plan.total(is_on_device) / GIB:.2f}[/]", where
            )
    return made
