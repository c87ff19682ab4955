"""Ten thousand requests from the OpenAPI document against the door: none may break it, or hang.

    .venv/bin/python -m experiments.door_fuzz                       in process, over a made-up cell
    .venv/bin/python -m experiments.door_fuzz --cases 500 --url http://127.0.0.1:8000 --key rv-...

schemathesis generates them, half of them wrong on purpose, evenly over all routes. In process half
of all ids exist, and a key that may teach, one that may not, none and a wrong one are drawn. With
--url a running server is asked, on this machine only: it teaches and undoes there whatever comes.
Prints JSON, and ends with 1 if an answer was a 5xx other than 503, a hang, or showed a trace.
"""

import json
import sys
import tempfile
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import httpx

import serve_app
from experiments import frame
from tests import fuzz

MAX_SHOWN = 20


def ask_running(url: str, cases: int, key: str | None, start: int) -> fuzz.Tally:
    """Against a server on this machine; raises ValueError for another address."""
    host = urlsplit(url).hostname or ""
    if host != "localhost" and not ip_address(host).is_loopback:
        raise ValueError(f"--url {url}: only a server on this machine is asked such things")
    with httpx.Client(timeout=fuzz.CASE_TIMEOUT_S) as http:
        document = http.get(f"{url}/openapi.json").json()

        def send(request: httpx.Request) -> httpx.Response:
            target = f"{url}{request.url.raw_path.decode()}"
            headers = [pair for pair in request.headers.multi_items() if pair[0] != "host"]
            content = request.read()
            return http.request(request.method, target, headers=headers, content=content)

        return fuzz.run(document, send, cases, keys=(key,), start=start, tell=show)


def ask_in_process(cases: int, start: int) -> fuzz.Tally:
    """Against the application itself, over a made-up cell."""
    with (
        tempfile.TemporaryDirectory() as place,
        fuzz.in_process(Path(place) / "home") as (door, send),
    ):
        known = fuzz.furnish(door, send)
        keys = [*[door._keys.add("teach")] * 6, door._keys.add("use"), None, "wrong"]
        document = serve_app.app.openapi()
        secrets = [place]
        return fuzz.run(
            document, send, cases, keys=keys, known=known, secrets=secrets, start=start, tell=show
        )


def show(tally: fuzz.Tally) -> None:
    """How far it is."""
    print(f"{tally.sent} sent, {len(tally.faults)} faults", end="\r", file=sys.stderr, flush=True)


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--url", help="a running server on this machine; default: in process")
    parser.add_argument("--key", help="for --url: a key that may teach")
    parser.add_argument("--json", type=Path, help="write the summary here")
    chosen = frame.begin(parser)
    if chosen.url:
        made = ask_running(chosen.url.rstrip("/"), chosen.cases, chosen.key, chosen.seed)
    else:
        made = ask_in_process(chosen.cases, chosen.seed)
    summary = {
        "sent": made.sent,
        "unsendable": made.unsendable,
        "statuses": {str(status): num for status, num in sorted(made.statuses.items())},
        "reached": dict(sorted(made.reached.items())),
        "num_faults": len(made.faults),
        "faults": made.faults[:MAX_SHOWN],
    }
    print(json.dumps(summary, indent=2))
    frame.keep(chosen.json, chosen, summary)
    return 1 if made.faults else 0


if __name__ == "__main__":
    sys.exit(main())
