"""The circuit of one endpoint: closed, open, half-open.

An endpoint that is ready for Kubernetes may still fail every request it gets, and a router that
looks at load likes it for being idle. After some failures in a row, or when most of the requests of
a while failed, its circuit opens and it gets none; after a time one request is let through as a
probe, and what becomes of it decides.

One that has gone silent (it hangs, or cannot be reached) fails nothing: requests to it just wait.
Its circuit is open for as long as nothing is heard of it, without a probe that would wait, too. An
answer to a request does not close it: behind a proxy that retries, who gave it may be a guess.

Pure: every call brings the time (seconds), and randomness is an argument.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

Source = Literal["request", "stream", "scrape"]
"""Who saw it: a request, the worker's stream of events, a question for the engine's figures."""


class Rng(Protocol):
    def random(self) -> float:
        """A float in [0, 1)."""
        ...


class State(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When circuits open, and for how long. All times are seconds."""

    enabled: bool = True
    consecutive_failures: int = 5
    """Failures in a row, of one source, that open the circuit (Envoy's ``consecutive_5xx``)."""
    failure_ratio: float = 0.5
    """Share of the requests of ``window`` that opens it when they fail; 0: none does."""
    window: float = 30.0
    min_requests: int = 20
    """In ``window``, for their ratio to mean something."""
    open_time: float = 5.0
    """Of the first opening. It doubles with each probe that fails (at most ``max_open_time``), and
    each time a random part of up to a fifth is added, so that pickers don't probe together."""
    max_open_time: float = 300.0
    max_open_share: float = 0.5
    """Of the endpoints that could serve a model, at most so many are kept from it, and never the
    last (Envoy's ``max_ejection_percent``). When all fail, it is not the endpoints."""
    probe_time: float = 60.0
    """A probe of which nothing was heard for so long is given up, and another is sent."""

    def __post_init__(self) -> None:
        if self.consecutive_failures < 1 or self.min_requests < 1:
            raise ValueError("consecutive_failures and min_requests must be ≥ 1")
        for name in ("failure_ratio", "max_open_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        for name in ("window", "open_time", "max_open_time", "probe_time"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number > 0")


@dataclass(slots=True)
class _Second:
    at: int
    requests: int = 0
    failures: int = 0


@dataclass(slots=True)
class Breaker:
    """State of one endpoint's circuit."""

    reason: str = ""
    """Why it opened last: `5 failures in a row (503)`; "" if it is closed."""
    silence: str = ""
    """Since when nothing is heard of the endpoint, in words; "" if something is."""
    opened_at: float = -math.inf
    """The first opening since it was closed."""
    _since: float = -math.inf  # of the last transition; what began before tells nothing any more
    _open_until: float | None = None  # None: closed
    _half_open: bool = False
    _openings: int = 0  # in a row, without being closed for long in between
    _opened_by: Source = "request"
    _probed_until: float = -math.inf
    _in_a_row: dict[Source, int] = field(default_factory=dict)
    _seconds: deque[_Second] = field(default_factory=deque)  # the oldest first

    def state(self, now: float) -> State:
        if self.silence:
            return State.OPEN
        if self._open_until is None:
            return State.CLOSED
        if now >= self._open_until and not self._half_open:
            self._half_open, self._since = True, self._open_until
        return State.HALF_OPEN if self._half_open else State.OPEN

    def blocks(self, now: float) -> str:
        """Why the endpoint should get no request at this moment, or ""."""
        match self.state(now):
            case State.OPEN:
                return f"circuit open: {self.silence or self.reason}"
            case State.HALF_OPEN if now < self._probed_until:
                return f"circuit half-open, a probe is under way: {self.reason}"
        return ""

    def picked(self, now: float, settings: BreakerSettings) -> None:
        """A request goes to the endpoint. In a half-open circuit it is the probe."""
        if self.state(now) is State.HALF_OPEN:
            self._probed_until = now + settings.probe_time

    def released(self, now: float, grace: float = 1.0) -> None:
        """A request to it has ended; within ``grace`` it will be told how, or never."""
        self._probed_until = min(self._probed_until, now + grace)

    def silent(self, why: str, now: float) -> bool:
        """Nothing is heard of the endpoint any more. Whether that is new."""
        new = not self.silence
        if new and self._open_until is None:
            self.opened_at = now
        self.silence = why
        return new

    def heard(self) -> bool:
        """It shows that it lives. Whether that is new."""
        was_silent, self.silence = bool(self.silence), ""
        return was_silent

    def success(
        self, source: Source, now: float, settings: BreakerSettings, *, began: float | None = None
    ) -> None:
        """Something went well that began at ``began``, or just now."""
        if began is not None and began < self._since:
            return
        state = self.state(now)
        if source == "request":
            self._in_a_row.clear()
            self._count(now, settings, failed=False)
        else:
            self._in_a_row.pop(source, None)
        if state is State.HALF_OPEN and source in ("request", self._opened_by):
            self._close(now)

    def failure(
        self,
        source: Source,
        why: str,
        now: float,
        settings: BreakerSettings,
        rng: Rng,
        *,
        began: float | None = None,
    ) -> str:
        """Something failed. If this opens the circuit, what made it open: ``in-a-row``, ``ratio``
        or ``probe``; else ""."""
        if began is not None and began < self._since:
            return ""
        state = self.state(now)
        if state is State.OPEN:
            return ""
        if state is State.HALF_OPEN:
            if source not in ("request", self._opened_by):
                return ""
            self._open(f"the probe failed ({why})", source, now, settings, rng)
            return "probe"
        in_a_row = self._in_a_row[source] = self._in_a_row.get(source, 0) + 1
        if source == "request":
            self._count(now, settings, failed=True)
        if in_a_row >= settings.consecutive_failures:
            self._open(f"{in_a_row} failures in a row ({why})", source, now, settings, rng)
            return "in-a-row"
        requests = sum(second.requests for second in self._seconds)
        failures = sum(second.failures for second in self._seconds)
        if (
            source == "request"
            and settings.failure_ratio
            and requests >= settings.min_requests
            and failures >= settings.failure_ratio * requests
        ):
            reason = f"{failures} of {requests} requests failed in {settings.window:g} s ({why})"
            self._open(reason, source, now, settings, rng)
            return "ratio"
        return ""

    def _count(self, now: float, settings: BreakerSettings, *, failed: bool) -> None:
        seconds = self._seconds
        while seconds and seconds[0].at <= now - settings.window:
            seconds.popleft()
        if not seconds or seconds[-1].at != int(now):
            seconds.append(_Second(int(now)))
        seconds[-1].requests += 1
        seconds[-1].failures += failed

    def _open(
        self, reason: str, source: Source, now: float, settings: BreakerSettings, rng: Rng
    ) -> None:
        if self._open_until is None:
            self.opened_at = now
            if now - self._since > settings.max_open_time:  # closed for long: forgiven
                self._openings = 0
        # Beyond 2^30 no limit is left to reach.
        grown = settings.open_time * 2 ** min(self._openings, 30)
        self._openings += 1
        self._open_until = now + min(grown, settings.max_open_time) * (1 + rng.random() / 5)
        self._half_open, self._since = False, now
        self._opened_by, self.reason = source, reason
        self._probed_until = -math.inf
        self._in_a_row.clear()
        self._seconds.clear()

    def _close(self, now: float) -> None:
        self._open_until, self._half_open, self._since = None, False, now
        self.reason = ""
        self._in_a_row.clear()
        self._seconds.clear()
