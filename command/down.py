"""`reverie down`: ends a cell that was started elsewhere, in order, with its last checkpoint.

a record of 'reverie up' --> its process is asked to stop, and waited for
none ('serve run')       --> the cell is asked over Ray, and Serve's application deleted
"""

import logging
import time
from typing import Any, Final

import psutil

from actors.errors import ReverieError
from actors.home import default_home
from command import record
from command.client import Server, Unreachable
from command.options import DEFAULT_PORT, Json, Port, Yes
from command.output import Output
from command.record import CellRecord

LOOK_INTERVAL_S: Final = 0.2
REPORT_TIMEOUT_S: Final = 30
STOP_TIMEOUT_S: Final = 900
"""As long as `up` itself gives the cell for its last checkpoint."""


def down(port: Port = DEFAULT_PORT, is_sure: Yes = False, is_json: Json = False) -> None:
    """Stop a running cell: no further steps, a last checkpoint, then everything else."""
    output = Output(is_json)
    found = record.read(default_home(), port)
    process = found.process() if found is not None else None
    if found is not None and process is not None:
        output.confirm(f"Stop {found.model} on port {port}?", is_sure)
        saved = _end(found, process, output)
    else:
        pid = _cell_behind(port)
        output.confirm(f"Stop the cell on port {port}?", is_sure)
        with output.waiting("stopping"):
            saved = _end_over_ray(port, pid)
    output.show({"port": port, "saved": saved}, f"stopped; saved: {saved}")
    if not saved.startswith(("generation", "nothing to save")):
        raise ReverieError(f"the cell has ended without its last checkpoint: {saved}")


def _end(found: CellRecord, process: psutil.Process, output: Output) -> str:
    with output.waiting("stopping: a last checkpoint, then everything else"):
        process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        # Not `wait`: a process that has ended, and that its parent has not asked for, is there.
        while found.process() is not None:
            if time.monotonic() > deadline:
                raise ReverieError(
                    f"pid={found.pid}: the cell has not ended within {STOP_TIMEOUT_S} s; "
                    "see 'reverie logs', and end that process yourself"
                )
            time.sleep(LOOK_INTERVAL_S)
    ended = record.read(default_home(), found.port)
    return (ended.saved if ended is not None else None) or "its process ended without a word"


def _cell_behind(port: int) -> int:
    """The process of the cell whose door is there; raises Unreachable if there is none."""
    found = Server(port).get("/status")
    if not found.get("cell"):
        raise Unreachable(f"port={port}: {found.get('reason')}").about("port")
    return int(found["cell"]["pid"])


def _end_over_ray(port: int, pid: int) -> str:
    from actors.local_ray import join_here

    join_here()
    import ray
    from ray import serve

    from actors.ending import CELL, NAMESPACE

    try:
        ray.init(
            address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
        cell: Any = ray.get_actor(CELL, NAMESPACE)
        if ray.get(cell.report.remote(), timeout=REPORT_TIMEOUT_S).pid != pid:
            raise ValueError("the cell of another door")
    except (ConnectionError, ValueError):
        ray.shutdown()
        raise ReverieError(
            f"port={port}: a server answers, but this REVERIE_HOME knows of none there, and no Ray "
            "that runs here has its cell; set REVERIE_HOME or RAY_ADDRESS to its own"
        ).about("port") from None
    try:
        saved = str(ray.get(cell.stop.remote(), timeout=STOP_TIMEOUT_S))
        serve.delete("reverie")
        ray.kill(cell)
    finally:
        ray.shutdown()
    return saved
