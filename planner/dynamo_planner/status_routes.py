"""`/planner` and `/planner/decisions` of the status server: what was decided, and why."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec
from aiohttp import web

from dynamo_planner.decision import Decision

REMEMBERED = 720
"""Looks: an hour of them, five seconds apart."""


@dataclass(frozen=True, slots=True)
class Told:
    """A decision with the time of day."""

    wall: str
    decision: Decision


@dataclass
class Journal:
    """The last decisions, and what the planner runs with."""

    config: dict[str, object]
    notes: tuple[str, ...]
    told: deque[Told] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/planner", self._planner)
        app.router.add_get("/planner/decisions", self._decisions)

    async def _planner(self, _: web.Request) -> web.Response:
        last = self.told[-1] if self.told else None
        return _json({"config": self.config, "notes": self.notes, "last": last})

    async def _decisions(self, request: web.Request) -> web.Response:
        """The newest first; ``?moved=1``: only those that ordered something."""
        found = [
            each
            for each in reversed(self.told)
            if not request.query.get("moved") or each.decision.orders
        ]
        return _json({"decisions": found})


def _json(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
