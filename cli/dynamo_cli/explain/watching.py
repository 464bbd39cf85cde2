"""New decisions as they are made, from all replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from dynamo_cli.explain.pickers import Picker, decisions

Json = dict[str, Any]
Key = tuple[str, str, float]  # picker, request, time of the pick

EVERY_S = 1.0
WINDOW = 500
"""Decisions looked at each time, of each replica; with more in a second some are missed."""
PATIENCE_S = 10.0
"""A request that runs for longer is shown as running, instead of when it has ended."""


async def watch(
    pickers: Sequence[Picker],
    first: int,
    filters: Mapping[str, str],
    on_silent: Callable[[dict[str, str]], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[Json]:
    """Each decision once, the oldest first: the last ``first`` ones, then every new one.

    A decision is given when its request has ended, or has been seen running for ``PATIENCE_S``.
    ``on_silent`` is told which replicas give no answer, whenever that changes; an empty dictionary:
    all do.
    """
    given: set[Key] = set()
    running: dict[Key, float] = {}  # -> since when we know of it
    silent: dict[str, str] = {}
    begun = False
    while True:
        answers = await decisions(pickers, limit=str(WINDOW), brief="1", **filters)
        if answers.silent.keys() != silent.keys():
            on_silent(answers.silent)
        silent, now = answers.silent, clock()
        found = {_key(decision): decision for decision in reversed(answers.decisions)}
        if not begun:
            given.update(list(found)[: max(0, len(found) - first)])
            begun = not silent or bool(found)
        for key, decision in found.items():
            if key in given:
                continue
            since = running.setdefault(key, now)
            if "status" in decision["outcome"] or now - since >= PATIENCE_S:
                given.add(key)
                del running[key]
                yield decision
        if not silent:  # what is out of sight does not come back
            given &= found.keys()
            running = {key: since for key, since in running.items() if key in found}
        await pause(EVERY_S)


def _key(decision: Json) -> Key:
    return decision.get("picker", ""), decision["request_id"], decision["time"]
