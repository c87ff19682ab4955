"""`reverie up`: runs a cell in the foreground, and ends everything that it started.

    reverie up --model smollm2-135m --port 8000 --set trainer.rank=128

    Ray --> Serve and the ingress --> the cell's actors        and in the opposite order at the end

The one command that puts all rooms together. Where it can be found, `command/record.py` says.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from actors.errors import BootFailed, ReverieError, SettingsError
from actors.home import DEFAULT_MODEL, MIB
from actors.local_ray import join_here, start_here
from command import record
from command.options import DEFAULT_PORT, Json, Port, pairs_of
from command.output import Output

if TYPE_CHECKING:
    from actors.settings import Settings

NUM_RAY_STARTS: Final = 3
RAY_END_TIMEOUT_S: Final = 10
POLL_INTERVAL_S: Final = 0.25
STOP_TIMEOUT_S: Final = 900
OBJECT_STORE_BYTES: Final = 128 * MIB
"""Ray's object store; no tensor ever passes through it."""

RAY_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "120",  # A busy machine is slow, not broken.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Calls that its dashboard can look back at: with the usual 100,000 its memory grows for hours.
    "RAY_task_events_max_num_task_in_gcs": "10000",
    # The ingress only awaits, so it needs no thread of its own: one hop less per request and chunk.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}

T = TypeVar("T")


class Clock:
    """Prints stages with the time since the start; on stderr where stdout is for a document."""

    def __init__(self, is_json: bool = False) -> None:
        self._begun = time.monotonic() - float(os.environ.get("REVERIE_ELAPSED_S") or 0)
        self.is_json = is_json

    def say(self, text: str) -> None:
        stream = sys.stderr if self.is_json else sys.stdout
        print(f"[{time.monotonic() - self._begun:6.1f} s] {text}", file=stream, flush=True)


def up(
    model: Annotated[
        str, typer.Option(help="A directory, a hub id, or the default model's name.")
    ] = DEFAULT_MODEL,
    port: Port = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="Any but 127.0.0.1 needs API keys.")] = "127.0.0.1",
    ray_address: Annotated[
        str, typer.Option(help="local starts Ray and stops it; auto joins the Ray that runs here.")
    ] = "local",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as group.key=value.")
    ] = None,
    is_json: Json = False,
) -> None:
    """Run a cell in the foreground; Ctrl-C or 'reverie down' stops everything it started.

    With --json the document is printed once it is ready, and the stages go to stderr.
    """
    from actors.settings import Settings

    Output(is_json)
    pairs: dict[str, Any] = {"model": model, "port": port, "host": host}
    pairs |= pairs_of(set_, "group.key=value")
    settings = Settings.from_pairs(pairs)
    check_address(settings)
    serve_until(settings, pairs, ray_address, Clock(is_json))


def check_address(settings: "Settings") -> None:
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


def serve_until(
    settings: "Settings", pairs: dict[str, Any], ray_address: str, clock: Clock
) -> None:
    """Start Ray, Serve and the cell; wait for a signal; stop them in the opposite order."""
    clock.say("starting Ray")
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    (start_here if ray_address == "local" else join_here)()
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
    begin = partial(
        ray.init,
        address=ray_address,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **(node if is_local else {}),
    )
    try:
        joined = begin_ray(begin, clock)
    except ConnectionError as error:
        raise SettingsError(f"--ray-address {ray_address}: {error}") from None
    asked_to_stop = _stop_on_signals()  # After Ray, which installs handlers of its own.
    failed, saved = None, "the cell never started"
    this = record.mine(settings.port, settings.host, settings.model, session_of(joined))
    record.write(settings.home, this)
    cell = connect(settings)
    try:
        cell.start.remote()
        open_door(settings, pairs)
        failed = follow(cell, clock, settings, asked_to_stop)
    finally:
        clock.say("stopping")
        saved = stop(cell, clock, is_local)
        record.end(settings.home, this, saved)
    if failed is not None:
        raise ReverieError(failed)


def begin_ray(begin: Callable[[], T], clock: Clock) -> T:
    """What `begin` returns: tried again, for Ray gives its processes 30 s on any machine.

    Raises BootFailed if it comes to nothing, and ConnectionError where there is no cluster.
    What a try has started is ended before the next.
    """
    import psutil

    this = psutil.Process()
    others = this.children(recursive=True)
    for number in range(1, NUM_RAY_STARTS + 1):
        try:
            return begin()
        except ConnectionError:
            raise
        except Exception as error:  # Of no kind of its own.
            reason = str(error).splitlines()[0]
        left = [each for each in this.children(recursive=True) if each not in others]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, RAY_END_TIMEOUT_S)
        if number < NUM_RAY_STARTS:
            clock.say(f"Ray did not start: {reason}; once more")
    raise BootFailed(f"Ray did not start: {reason}; try again, or see 'reverie doctor'")


def session_of(joined: Any) -> dict[str, str]:
    """Of the Ray that was joined, what others need to find it."""
    address = dict(joined.address_info)
    dashboard = str(joined.dashboard_url or "")
    return {
        "ray_address": str(address.get("gcs_address") or ""),
        "dashboard": f"http://{dashboard}" if dashboard else "",
        "session_dir": str(address.get("session_dir") or ""),
        "auth_mode": os.environ.get("RAY_AUTH_MODE", "disabled"),
    }


def open_door(settings: "Settings", pairs: dict[str, Any]) -> None:
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


def follow(cell: Any, clock: Clock, settings: "Settings", asked: threading.Event) -> str | None:
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


def _announce(report: Any, clock: Clock, settings: "Settings") -> None:
    base = f"http://{settings.host}:{settings.port}"
    trainer = report.trainer
    if clock.is_json:
        facts = {"base": base, "pid": os.getpid(), "model": settings.model}
        Output.current.show(facts | {"weights_version": trainer.weights_version})
    clock.say(
        f"ready        {trainer.num_tensors} tensors, {trainer.weights_bytes / MIB:.0f} MiB, "
        f"one copy; version {trainer.weights_version}"
    )
    if clock.is_json:
        return
    if not report.checkpoint.is_swap_atomic:
        print(
            "\n  note   this file system cannot exchange two directories in one step (is it NFS?):"
        )
        print("         at a publication there is no public directory for an instant")
    print(f"\n  look   {base}/ui   (in a browser)\n  ask    {base}/v1   (OpenAI's API)")
    print(f"  teach  {base}/train\n  read   {base}/docs")
    print("  stop   Ctrl-C\n", flush=True)


def stop(cell: Any, clock: Clock, is_local: bool) -> str:
    """Save and end the cell; then Ray, which ends Serve with it, or only what was added to it.

    Blocks until every process that was started here has ended. Returns what became of the last
    checkpoint, in words.
    """
    import psutil
    import ray
    from ray import serve

    from actors.ending import wait_or_kill

    try:
        saved = str(ray.get(cell.stop.remote(), timeout=STOP_TIMEOUT_S))
        clock.say(f"saved: {saved}")
    except Exception as error:
        saved = f"the cell did not stop by itself: {type(error).__name__}"
        clock.say(saved)
    if not is_local:
        serve.delete("reverie")
        ray.kill(cell)
    # Ray's dashboard has processes of its own, which end a little after it.
    family = psutil.Process().children(recursive=True) if is_local else []
    ray.shutdown()
    wait_or_kill(family)
    clock.say("stopped")
    return saved
