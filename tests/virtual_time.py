"""Hours in milliseconds: an event loop whose clock the tests need not wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next thing that is due, and never stands still."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        scheduled, ready = self._scheduled, self._ready  # type: ignore[attr-defined]
        self._now += 1e-6
        if not ready:
            due = [handle.when() for handle in scheduled if not handle.cancelled()]
            self._now = max(self._now, min(due, default=0.0))
        super()._run_once()  # type: ignore[misc]


def in_virtual_time(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop = VirtualTime()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
