"""`/docs`: the OpenAPI document as one page of HTML, which fetches nothing and runs nothing.

The page that FastAPI brings loads scripts from a content delivery network: whoever controls that
would see every key typed into it, and a machine without a way out would see nothing.
"""

import hashlib
import json
from base64 import b64encode
from html import escape
from typing import Any, Final

from fastapi.responses import HTMLResponse

_STYLE: Final = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 13px; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid color-mix(in srgb, currentColor 20%,
  transparent); }
section { margin: 0 0 1.25rem; }
h2 { font-size: 1rem; margin: 0; }
p { margin: .15rem 0; }
"""
_HASH: Final = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS: Final = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def page(document: dict[str, Any]) -> HTMLResponse:
    """The routes of an OpenAPI document, each with what it does and what its body may be."""
    routes = [
        _route(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = escape(document["info"]["title"])
    return HTMLResponse(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: routes</title><style>{_STYLE}</style></head><body>"
        f"<h1>{title}</h1><p>Everything under <code>/v1</code> is vLLM's, as in OpenAI's API. "
        "Where there are keys, send <code>Authorization: Bearer KEY</code>. For programs: "
        f'<a href="/openapi.json">/openapi.json</a>.</p>{"".join(routes)}</body></html>',
        headers=HEADERS,
    )


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    says = operation.get("description") or operation.get("summary", "")
    content = operation.get("requestBody", {}).get("content", {})
    body = ""
    if schema := content.get("application/json", {}).get("schema"):
        text = escape(json.dumps(schema, indent=1))
        body = f"<details><summary>body</summary><pre>{text}</pre></details>"
    return (
        f"<section><h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
        f"<p>{escape(says)}</p>{body}</section>"
    )
