"""Start, ready, drain, stop: the life that every process of the platform leads.

Kubernetes asks three questions of a process (is it alive, may it get traffic, has it gone away in
good order), and a process that answers them by accident loses requests at every rollout. One
object holds the answer; the status server, the drain logic and the signal handlers share it.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable

import uvloop

from dynamo_runtime import collector
from dynamo_runtime.child import kill_all_children

log = logging.getLogger(__name__)


class Phase(enum.Enum):
    """Where a process stands. Phases only move forward."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Lifecycle:
    """The state of one process, shared by everything in it.

    ``ready`` is true only in phase ``READY``. A process may lose and regain readiness
    (``set_not_ready``/``set_ready``) until it drains; draining is final. ``first_ready`` is called
    once, before the first traffic.
    """

    def __init__(self, first_ready: Callable[[], None] | None = None) -> None:
        self._first_ready = first_ready
        self.phase = Phase.STARTING
        self.reason = "starting"
        self.stop_requested = asyncio.Event()

    @property
    def ready(self) -> bool:
        return self.phase is Phase.READY

    def set_ready(self) -> None:
        """Take traffic, unless a stop was requested."""
        if self.phase is Phase.STARTING:
            if self._first_ready is not None:
                self._first_ready()
                self._first_ready = None
            self.phase = Phase.READY
            self.reason = ""

    def set_not_ready(self, reason: str) -> None:
        """Take no traffic, and say why in the readiness answer."""
        if self.phase in (Phase.READY, Phase.STARTING):
            self.phase = Phase.STARTING
            self.reason = reason

    def request_stop(self, reason: str) -> None:
        """Begin to drain. The first call counts; later ones change nothing."""
        if not self.stop_requested.is_set():
            self.phase = Phase.DRAINING
            self.reason = reason
            self.stop_requested.set()

    def set_stopped(self) -> None:
        self.phase = Phase.STOPPED
        self.reason = "stopped"


# A terminal's Ctrl-C reaches the whole process group, and a supervisor above us then sends SIGTERM
# for the same wish. Two signals this close are one request, not a request to force.
SAME_REQUEST_SECONDS = 0.5


def run(main: Callable[[Lifecycle], Awaitable[int]]) -> int:
    """Run ``main`` on a fresh event loop with signal handling; return its exit status.

    The first SIGTERM or SIGINT requests a stop and ``main`` is expected to drain and return. A
    second one, at least ``SAME_REQUEST_SECONDS`` later, kills the children and exits at once with
    128 + the signal's number.
    """

    async def supervised() -> int:
        lifecycle = Lifecycle(first_ready=collector.settle)
        first: float | None = None

        def on_signal(number: signal.Signals) -> None:
            nonlocal first
            moment = time.monotonic()
            if first is None:
                first = moment
                log.info("received %s: draining (send it again to force)", number.name)
                lifecycle.request_stop(f"received {number.name}")
            elif moment - first >= SAME_REQUEST_SECONDS:
                log.warning("received %s again: stopping at once", number.name)
                kill_all_children()
                logging.shutdown()
                os._exit(128 + number)

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        try:
            return await main(lifecycle)
        finally:
            lifecycle.set_stopped()

    return uvloop.run(supervised())
