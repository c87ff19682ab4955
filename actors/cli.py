"""The `reverie` command: `up` (run a cell in the foreground), `demo`, `keys`, and those that ask.

reverie up --model smollm2-135m --port 8000 --set trainer.rank=128
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final

import typer

from actors.client import COMMANDS, Port
from actors.errors import ReverieError, SettingsError
from actors.settings import DEFAULT_MODEL, MIB, Settings, default_home

POLL_INTERVAL_S: Final = 0.25
STOP_TIMEOUT_S: Final = 900
OBJECT_STORE_BYTES: Final = 128 * MIB
"""Ray's object store; no tensor ever passes through it."""

RAY_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # The ingress only awaits, so it needs no thread of its own: one hop less per request and chunk.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
keys_cli = typer.Typer(no_args_is_help=True, help="API keys; needed to serve on a public address.")
cli.add_typer(keys_cli, name="keys")
for command in COMMANDS:
    cli.command()(command)


class Clock:
    """Prints stages with the time since the start."""

    def __init__(self) -> None:
        self._begun = time.monotonic() - float(os.environ.get("REVERIE_ELAPSED_S") or 0)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begun:6.1f} s] {text}", flush=True)


@cli.command()
def up(
    model: Annotated[
        str, typer.Option(help="A directory, a hub id, or the default model's name.")
    ] = DEFAULT_MODEL,
    port: Port = 8000,
    host: Annotated[str, typer.Option(help="Any but 127.0.0.1 needs API keys.")] = "127.0.0.1",
    ray_address: Annotated[
        str, typer.Option(help="local starts Ray and stops it; auto joins the Ray that runs here.")
    ] = "local",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as group.key=value.")
    ] = None,
) -> None:
    """Run a cell in the foreground; Ctrl-C stops everything it started."""
    pairs: dict[str, Any] = {"model": model, "port": port, "host": host}
    for pair in set_ or []:
        key, is_pair, value = pair.partition("=")
        if not is_pair:
            raise SettingsError(f"--set {pair!r}: write it as group.key=value")
        pairs[key] = value
    settings = Settings.from_pairs(pairs)
    check_address(settings)
    serve_until(settings, pairs, ray_address)


def check_address(settings: Settings) -> None:
    """Refuse a public address without keys, and a port that is taken."""
    from door.keys import KeyStore

    if not settings.is_loopback and not KeyStore(settings.home).records():
        raise SettingsError(
            f"host={settings.host}: anybody who reaches it could teach the model; make a key first "
            "with 'reverie keys add --scope teach', or use 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise SettingsError(
                f"port={settings.port}: {error.strerror}; choose another with PORT= or --port"
            ) from None


def _stop_on_signals() -> threading.Event:
    asked = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        asked.set()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return asked


def serve_until(settings: Settings, pairs: dict[str, Any], ray_address: str) -> None:
    """Start Ray, Serve and the cell; wait for a signal; stop them in the opposite order."""
    clock = Clock()
    clock.say("starting Ray")
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The `python` of a submitted job is then this one, which has what the experiments import.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    import ray

    from actors.cell import connect
    from actors.ending import NAMESPACE

    is_local = ray_address == "local"
    node: dict[str, Any] = {
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    try:
        ray.init(
            address=ray_address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(node if is_local else {}),
        )
    except ConnectionError as error:
        raise SettingsError(f"--ray-address {ray_address}: {error}") from None
    asked_to_stop = _stop_on_signals()  # After Ray, which installs handlers of its own.
    failed = None
    cell = connect(settings)
    try:
        cell.start.remote()
        open_door(settings, pairs)
        failed = follow(cell, clock, settings, asked_to_stop)
    finally:
        clock.say("stopping")
        stop(cell, clock, is_local)
    if failed is not None:
        raise ReverieError(failed)


def open_door(settings: Settings, pairs: dict[str, Any]) -> None:
    """Start Serve's HTTP proxy on the settings' address, and the ingress behind it."""
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from serve_app import build_app

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    serve.start(
        http_options=HTTPOptions(host=settings.host, port=settings.port), logging_config=quiet
    )
    serve.run(
        build_app(pairs), name="reverie", route_prefix="/", logging_config=quiet, blocking=False
    )


def follow(cell: Any, clock: Clock, settings: Settings, asked: threading.Event) -> str | None:
    """Print stages and restarts until asked to stop; returns why the cell gave up, if it did."""
    import ray

    shown: set[tuple[int, str]] = set()
    state = "starting"
    while not asked.is_set():
        try:
            report = ray.get(cell.report.remote(), timeout=30)
        except ray.exceptions.RayError:
            asked.wait(1.0)
            continue
        for stage in report.stages:
            if stage.is_done and (report.boot, stage.name) not in shown:
                shown.add((report.boot, stage.name))
                if stage.name != "ready":
                    clock.say(f"{stage.name:<12} {stage.seconds:6.1f} s")
        if report.state != state:
            state = report.state
            if state == "ready":
                _announce(report, clock, settings)
            elif state == "recovering":
                clock.say(f"restarting: {report.reason}")
            elif state == "failed":
                return str(report.reason)
        asked.wait(POLL_INTERVAL_S)
    return None


def _announce(report: Any, clock: Clock, settings: Settings) -> None:
    base = f"http://{settings.host}:{settings.port}"
    trainer = report.trainer
    clock.say(
        f"ready        {trainer.num_tensors} tensors, {trainer.weights_bytes / MIB:.0f} MiB, "
        f"one copy; version {trainer.weights_version}"
    )
    if not report.checkpoint.is_swap_atomic:
        print(
            "\n  note   this file system cannot exchange two directories in one step (is it NFS?):"
        )
        print("         at a publication there is no public directory for an instant")
    print(f"\n  look   {base}/ui   (in a browser)\n  ask    {base}/v1   (OpenAI's API)")
    print(f"  teach  {base}/train\n  read   {base}/docs")
    print("  stop   Ctrl-C\n", flush=True)


def stop(cell: Any, clock: Clock, is_local: bool) -> None:
    """Save and end the cell; then Ray, which ends Serve with it, or only what was added to it.

    Blocks until every process that was started here has ended.
    """
    import psutil
    import ray
    from ray import serve

    from actors.ending import wait_or_kill

    try:
        clock.say(f"saved: {ray.get(cell.stop.remote(), timeout=STOP_TIMEOUT_S)}")
    except Exception as error:
        clock.say(f"the cell did not stop by itself: {type(error).__name__}")
    if not is_local:
        serve.delete("reverie")
        ray.kill(cell)
    # Ray's dashboard has processes of its own, which end a little after it.
    family = psutil.Process().children(recursive=True) if is_local else []
    ray.shutdown()
    wait_or_kill(family)
    clock.say("stopped")


@cli.command()
def demo(
    port: Port = 8000,
    picture: Annotated[Path | None, typer.Option(help="Also draw it, as this SVG file.")] = None,
) -> None:
    """Teach a running server one answer and show the proof: versions, gaps, and one copy."""
    from actors.demo import run

    run(f"http://127.0.0.1:{port}", picture)


@cli.command()
def mirror(
    destination: Annotated[str, typer.Argument(help="A directory, or host:path over ssh.")],
    model: Annotated[str, typer.Option(help="Which model of REVERIE_HOME.")] = DEFAULT_MODEL,
) -> None:
    """Bring a copy of a model's state up to date, by rsync, while its cell runs or not."""
    from actors.mirror import mirror as ship

    made = ship(default_home(), model, destination, Clock().say)
    print(f"generation {made.generation} (version {made.weights_version}) is mirrored and verified")


@cli.command()
def restore(
    source: Annotated[str, typer.Argument(help="What 'reverie mirror' has made.")],
) -> None:
    """Put a mirror's state into an empty REVERIE_HOME; 'reverie up' recovers from it."""
    from actors.mirror import restore as bring_back

    made = bring_back(default_home(), source, Clock().say)
    print(
        f"generation {made.generation} of {made.model} is there; start it with its name as --model"
    )


@keys_cli.command("add")
def keys_add(
    scope: Annotated[str, typer.Option(help="use (ask the model) or teach (also change it).")],
) -> None:
    """Make a key and print it: the only time it can be seen."""
    from door.keys import KeyStore

    if scope not in ("use", "teach"):
        raise SettingsError(f"scope={scope!r}: choose use or teach")
    print(KeyStore(default_home()).add("teach" if scope == "teach" else "use"))


@keys_cli.command("list")
def keys_list() -> None:
    """Ids and scopes; the keys themselves are stored as hashes."""
    from door.keys import KeyStore

    for record in KeyStore(default_home()).records():
        print(f"{record['id']}  {record['scope']}")


@keys_cli.command("remove")
def keys_remove(
    key_id: Annotated[str, typer.Argument(help="An id from 'reverie keys list'.")],
) -> None:
    """Forget a key; a running server refuses it from its next request on."""
    from door.keys import KeyStore

    if not KeyStore(default_home()).remove(key_id):
        raise SettingsError(f"{key_id}: there is no key of this id; see 'reverie keys list'")


def main() -> None:
    """Entry point: a fault of the user's is one line on stderr and exit status 1."""
    try:
        cli()
    except ReverieError as error:
        print(f"reverie: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
