"""What the ingress costs: throughput and first token through it, against vLLM's own socket.

    reverie up                                   # in one terminal
    RAY_AUTH_MODE=token ray job submit --working-dir . -- \\
        python -m experiments.ingress_overhead
    .venv/bin/python -m experiments.ingress_overhead --rounds 5 --json overhead.json

Both ways run the same client and the same requests in one process, in alternating rounds, so that
the machine's noise falls on both; what is reported are ratios and differences of medians.
"""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from actors.messages import CellReport
from experiments import frame
from experiments.cells import find_ray

STREAMS = (1, 8, 32, 128)


@dataclass(frozen=True)
class Measured:
    """One batch of concurrent streams."""

    first_token_s: list[float]
    tokens_per_s: float


async def one_stream(
    session: aiohttp.ClientSession, base: str, body: dict[str, Any]
) -> list[float]:
    """Arrival times of a stream's tokens, relative to the request, in seconds."""
    begun, times = time.perf_counter(), []
    async with session.post(f"{base}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"the server answered {answer.status}: {await answer.text()}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - begun)
    return times


async def batch(
    session: aiohttp.ClientSession, base: str, model: str, streams: int, tokens: int
) -> Measured:
    """`streams` requests at once; all end after exactly `tokens` tokens."""
    body = {"model": model, "max_tokens": tokens, "ignore_eos": True, "stream": True, "seed": 0}
    begun = time.perf_counter()
    runs = await asyncio.gather(
        *(one_stream(session, base, body | {"prompt": f"Story {at}:"}) for at in range(streams))
    )
    return Measured([times[0] for times in runs], streams * tokens / (time.perf_counter() - begun))


async def measure(socket: str, base: str, rounds: int, tokens: int) -> list[dict[str, float]]:
    """One row per number of streams."""
    timeout = aiohttp.ClientTimeout(total=600)
    rows = []
    async with (
        # Without a limit: a client's own queue would be measured with 128 streams.
        aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(socket, limit=0), timeout=timeout
        ) as direct,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as door,
    ):
        async with door.get(f"{base}/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        for streams in STREAMS:
            ways = {"direct": (direct, "http://engine"), "ingress": (door, base)}
            seen: dict[str, list[Measured]] = {way: [] for way in ways}
            for number in range(rounds + 1):
                order = list(ways) if number % 2 else list(reversed(ways))
                for way in order:
                    result = await batch(*ways[way], model, streams, tokens)
                    if number:  # The first round warms both ways up.
                        seen[way].append(result)
            row = summarise(streams, seen)
            frame.say(show(row))
            rows.append(row)
    return rows


def summarise(streams: int, seen: dict[str, list[Measured]]) -> dict[str, float]:
    first = {way: median(t for m in runs for t in m.first_token_s) for way, runs in seen.items()}
    rate = {way: median(m.tokens_per_s for m in runs) for way, runs in seen.items()}
    return {
        "streams": streams,
        "direct_tokens_per_s": round(rate["direct"], 1),
        "ingress_tokens_per_s": round(rate["ingress"], 1),
        "throughput_ratio": round(rate["ingress"] / rate["direct"], 3),
        "direct_first_token_ms": round(1000 * first["direct"], 1),
        "ingress_first_token_ms": round(1000 * first["ingress"], 1),
        "first_token_added_ms": round(1000 * (first["ingress"] - first["direct"]), 1),
    }


def show(row: dict[str, float]) -> str:
    return (
        f"{row['streams']:>3} streams: {row['ingress_tokens_per_s']:7.1f} of "
        f"{row['direct_tokens_per_s']:7.1f} tokens/s ({row['throughput_ratio']:.3f}), first token "
        f"{row['ingress_first_token_ms']:6.1f} ms against {row['direct_first_token_ms']:6.1f} ms "
        f"({row['first_token_added_ms']:+.1f})"
    )


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--base", default="http://127.0.0.1:8000", help="address of the ingress")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds each way")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each stream")
    parser.add_argument("--json", type=Path, help="write the summary here")
    arguments = frame.begin(parser)
    find_ray(urlsplit(arguments.base).port or 80)
    import ray

    from actors.ending import CELL, NAMESPACE

    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=40)
    cell: Any = ray.get_actor(CELL, NAMESPACE)
    report: CellReport = ray.get(cell.report.remote(), timeout=30)
    if report.state != "ready" or report.paths is None:
        raise SystemExit(f"the cell is {report.state}: {report.reason}")
    rows = asyncio.run(
        measure(report.paths.socket, arguments.base, arguments.rounds, arguments.tokens)
    )
    frame.keep(arguments.json, arguments, {"rows": rows})


if __name__ == "__main__":
    main()
