"""What a running cell listens on: this machine only, and one port of Serve's behind Ray's token."""

import os
import stat
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import RunningCell

pytestmark = pytest.mark.cell

REPLICA = "ServeReplica"
METHOD = "/ray.serve.ASGIService/HandleRequest"
CALL_TIMEOUT_S = 10


def listening(cell: RunningCell) -> list[tuple[str, str, int]]:
    """Name of the process, address and port, of all that the cell has started."""
    if cell.process is None:
        pytest.skip("the cell is not ours, so neither are its processes known")
    first = psutil.Process(cell.process.pid)
    found = []
    for process in (first, *first.children(recursive=True)):
        try:
            name = " ".join(process.cmdline())
            sockets = process.net_connections("inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for each in sockets:
            if each.status == psutil.CONN_LISTEN:
                found.append((name, each.laddr.ip, each.laddr.port))
    return found


def is_here(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_only_serves_replica_listens_beyond_this_machine(cell: RunningCell) -> None:
    found = listening(cell)
    assert len(found) > 5, "more than that must listen somewhere"
    beyond = [(name, address) for name, address, _ in found if not is_here(address)]
    assert all(REPLICA in name for name, _ in beyond), beyond


def test_what_listens_there_asks_for_rays_token(cell: RunningCell) -> None:
    grpc: Any = import_module("grpc")
    ports = [port for name, address, port in listening(cell) if not is_here(address)]
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = channel.unary_unary(METHOD, bytes, bytes)
            for metadata in ((), (("authorization", "Bearer " + "a" * 64),)):
                with pytest.raises(grpc.RpcError) as refused:
                    ask(b"", timeout=CALL_TIMEOUT_S, metadata=metadata)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_token_is_this_users_only(cell: RunningCell) -> None:
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
