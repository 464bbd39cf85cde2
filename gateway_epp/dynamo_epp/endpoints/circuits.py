"""The circuits of a pool: who tells them what, and which of them are obeyed.

A circuit is opened by what its endpoint did. Whether it is obeyed depends on the others: a share of
those that could serve a model always goes on getting requests.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from dynamo_epp.endpoints.breaker import BreakerSettings, Rng, Source, State
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.server.access_log import AccessEntry

log = logging.getLogger(__name__)

_FAILURES = {
    "upstream_connection_failure": "connect failure",
    "upstream_remote_reset": "reset",
    "upstream_connection_termination": "connection lost",
    "upstream_protocol_error": "protocol error",
    "upstream_request_timeout": "timeout",
    "stream_idle_timeout": "silent",
}
"""Envoy's response flags that an endpoint is to blame for."""
BEFORE_THE_FIRST_BYTE = "no answer"
"""An endpoint that the proxy left for the next on the list."""


def verdicts(logged: AccessEntry, order: tuple[str, ...]) -> dict[str, str]:
    """What an entry of Envoy's access log tells of endpoints: ``ip:port`` -> "" (it went well) or
    what was wrong. ``order`` is the picker's list, down which Envoy goes when it retries.

    A client that leaves tells nothing of the endpoint it left, and a status below 500 is a success:
    the engine is well, whatever the request was.
    """
    failed = next((_FAILURES[flag] for flag in logged.flags if flag in _FAILURES), "")
    if not logged.upstream:
        return dict.fromkeys(order[: logged.attempts], failed) if failed else {}
    told: dict[str, str] = {}
    if logged.upstream in order:
        before = min(order.index(logged.upstream), max(0, logged.attempts - 1))
        told = dict.fromkeys(order[:before], BEFORE_THE_FIRST_BYTE)
    left = any(flag.startswith("downstream_") for flag in logged.flags)
    if not failed and logged.status >= 500:
        failed = str(logged.status)
    if failed or not left:
        told[logged.upstream] = failed
    return told


def obeyed(workers: Iterable[Worker], now: float, settings: BreakerSettings) -> dict[Worker, str]:
    """Worker -> why it gets no request: open circuits, as far as enough others are left.

    Those that share a base model and a role stand in for one another; those that can't serve for
    other reasons don't count. Which opened first is obeyed first.
    """
    groups: dict[tuple[str, str], list[Worker]] = defaultdict(list)
    for worker in workers:
        endpoint = worker.endpoint
        if endpoint.ready and not endpoint.terminating and not worker.load.draining:
            groups[worker.model, endpoint.role].append(worker)
    result: dict[Worker, str] = {}
    for group in groups.values():
        blocking = [(worker, why) for worker in group if (why := worker.breaker.blocks(now))]
        blocking.sort(key=lambda pair: pair[0].breaker.opened_at)
        allowed = min(int(settings.max_open_share * len(group)), len(group) - 1)
        result.update(blocking[:allowed])
    return result


def told(worker: Worker, now: float) -> str:
    """The circuit of ``worker`` in words; "" if it is closed."""
    why = worker.breaker.blocks(now)
    if why and not worker.circuit:
        return f"{why}; it gets requests all the same, as too few others are left"
    return why


class Circuits:
    """All circuits of a pool. ``workers`` gives its workers, ``on_open`` hears of openings."""

    def __init__(
        self,
        settings: BreakerSettings,
        workers: Callable[[], Iterable[Worker]],
        rng: Rng,
        on_open: Callable[[str], None] = lambda cause: None,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._rng = rng
        self._on_open = on_open
        self._troubled = False  # some circuit is not closed

    def failed(
        self, worker: Worker, source: Source, why: str, now: float, *, began: float | None = None
    ) -> None:
        """Something with ``worker`` failed that began at ``began``, or just now."""
        if not self._settings.enabled:
            return
        cause = worker.breaker.failure(source, why, now, self._settings, self._rng, began=began)
        if cause:
            log.warning("%s: circuit open: %s", worker.name, worker.breaker.reason)
            self._on_open(cause)
            self._troubled = True
            self.apply(now)

    def silent(self, worker: Worker, why: str, now: float) -> None:
        """``worker`` tells nothing any more, and does not answer when it is asked."""
        if self._settings.enabled and worker.breaker.silent(why, now):
            log.warning("%s: circuit open: %s", worker.name, why)
            self._on_open("silent")
            self._troubled = True
            self.apply(now)

    def heard(self, worker: Worker, now: float) -> None:
        """``worker`` told something, or answered."""
        if worker.breaker.heard():
            log.info("%s: it answers again", worker.name)
            self.apply(now)

    def succeeded(
        self, worker: Worker, source: Source, now: float, *, began: float | None = None
    ) -> None:
        was_open = worker.breaker.reason
        worker.breaker.success(source, now, self._settings, began=began)
        if was_open and not worker.breaker.reason:
            log.info("%s: circuit closed", worker.name)
            self.apply(now)

    def logged(self, entry: AccessEntry, order: tuple[str, ...], now: float) -> None:
        """An entry of the proxy's access log about a request that went down ``order``."""
        began = None if entry.last_byte_s is None else now - entry.last_byte_s
        self._tell(verdicts(entry, order), now, began)

    def relayed(self, endpoint: str, status: int, now: float, began: float) -> None:
        """An answer of ``endpoint`` that passed through this process; ``status`` 0: none came."""
        if status:
            self._tell({endpoint: str(status) if status >= 500 else ""}, now, began)

    def _tell(self, told: dict[str, str], now: float, began: float | None) -> None:
        if not told:
            return
        for worker in self._workers():
            why = told.get(worker.hostport)
            if why:
                self.failed(worker, "request", why, now, began=began)
            elif why is not None:
                self.succeeded(worker, "request", now, began=began)

    def picked(self, worker: Worker, now: float) -> None:
        """A request goes to ``worker``."""
        if self._troubled:
            worker.breaker.picked(now, self._settings)

    def released(self, worker: Worker, now: float) -> None:
        """A request to ``worker`` has ended."""
        if self._troubled:
            worker.breaker.released(now)

    def apply(self, now: float) -> None:
        """Bring ``Worker.circuit`` up to date; at once if all circuits are closed."""
        if not self._troubled:
            return
        workers = list(self._workers())
        kept_away = obeyed(workers, now, self._settings)
        for worker in workers:
            worker.circuit = kept_away.get(worker, "")
        self._troubled = any(w.breaker.state(now) is not State.CLOSED for w in workers)

    def states(self, now: float) -> Counter[str]:
        """How many circuits are in each state; ``disobeyed`` are those that are open and get
        requests all the same, for want of others."""
        self.apply(now)
        counts: Counter[str] = Counter()
        for worker in self._workers():
            state = worker.breaker.state(now)
            ignored = state is State.OPEN and not worker.circuit
            counts["disobeyed" if ignored else str(state)] += 1
        return counts
