"""The journal and the workers over HTTP, for those who run the cluster.

`/debug/decisions` takes `request_id`, or `limit`, `worker` and `model`; `brief=1` leaves out the
candidates. `/debug/totals` counts what is kept, `/debug/workers` shows the endpoints. `/debug` is
made of these, for people.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from dynamo_epp.explain.debug_page import add_debug_page
from dynamo_epp.explain.journal import Journal
from dynamo_epp.requests import error_body


def _json(data: Any) -> web.Response:
    # Infinities become ``null`` by themselves.
    return web.Response(
        body=msgspec.json.encode(data, enc_hook=str), content_type="application/json"
    )


def add_debug_routes(
    app: web.Application, journal: Journal, state: Callable[[], dict[str, Any]]
) -> None:
    """Add the routes to a status server that has not started. ``state`` tells the workers."""

    async def decisions(request: web.Request) -> web.Response:
        query = request.query
        brief = query.get("brief", "") not in ("", "0", "false")
        wanted, limit = query.get("request_id"), query.get("limit", "50")
        if wanted is not None:
            found = journal.find(wanted)
            entries = [] if found is None else [found]
        elif limit.isdecimal() and limit.isascii() and len(limit) < 10:
            entries = list(
                journal.newest(
                    int(limit), worker=query.get("worker", ""), model=query.get("model", "")
                )
            )
        else:
            text = error_body(
                400,
                f"limit is {limit[:20]!r}; it must be a number below 1,000,000,000",
                param="limit",
            )
            return web.Response(body=text, status=400, content_type="application/json")
        return _json({"decisions": [e.brief() if brief else e.to_json() for e in entries]})

    async def totals(_: web.Request) -> web.Response:
        return _json(journal.totals())

    async def workers(_: web.Request) -> web.Response:
        return _json(state())

    app.router.add_get("/debug/decisions", decisions)
    app.router.add_get("/debug/totals", totals)
    app.router.add_get("/debug/workers", workers)
    add_debug_page(app)
