"""`/debug`: the picker in a browser.

One page that loads nothing from elsewhere and asks the status server's own JSON routes, relative to
where it was found, so that it works through port-forwards and the API server's proxy too. Model
names, paths and ids in that JSON come from clients: the page puts them in place as text, and its
policy lets nothing run but its own script.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from aiohttp import web

_PAGE = Path(__file__).with_name("page.html")


def _hash(page: str, tag: str) -> str:
    """The CSP source of the one inline element ``tag`` (CSP level 3, 2.3.1)."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def policy(page: str) -> str:
    """The Content-Security-Policy under which ``page`` works and nothing else does."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(page, 'script')}",
            f"style-src {_hash(page, 'style')}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def add_debug_page(app: web.Application) -> None:
    """Add `/debug` to a status server that has not started."""
    page = _PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }

    async def debug(_: web.Request) -> web.Response:
        return web.Response(text=page, content_type="text/html", charset="utf-8", headers=headers)

    app.router.add_get("/debug", debug)
