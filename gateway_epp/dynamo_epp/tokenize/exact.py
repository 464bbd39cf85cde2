"""Whether token counts can be trusted: checked on every answered request, never assumed.

A router that hashes other tokens than the engine does is silently wrong: it promises cache hits
that are none. The engine reports each prompt's token count, which costs nothing to compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class NotExact(Exception):
    """These tokens cannot be known here. The request is routed by load; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooCostly(NotExact):
    """Tokenizing this prompt costs too much at this moment, wherever it is done."""


class Trust(Enum):
    """What the predictions of one tokenizer are used for."""

    EXACT = "exact"
    MISMATCH = "mismatch"


_CONSECUTIVE = 3  # so many wrong in a row: no outlier
_WINDOW = 64  # observations the rate is taken over
_RATE_MINIMUM = 8  # wrong ones within the window: a kind of request is predicted wrongly
_RECOVERY = 16  # right ones in a row to be trusted again
_RECOVERY_LIMIT = 1024
_PROBE_EVERY = 8


@dataclass(slots=True)
class Exactness:
    """The running comparison of predicted with reported prompt tokens, for one model.

    Rule: 3 wrong in a row, or 8 among the last 64, and the tokenizer is not trusted: requests go
    by load. Every 8th request is still predicted as a probe, and 16 right ones in a row restore
    trust; each relapse doubles that number, up to 1,024, so that it cannot flap.
    """

    state: Trust = Trust.EXACT
    matched: int = 0
    mismatched: int = 0
    relapses: int = 0
    last: tuple[int, int] | None = None
    """Predicted and reported tokens of the last mismatch."""
    _run: int = 0  # length of the current run of equal outcomes
    _run_matches: bool = True
    _window: list[bool] = field(default_factory=list)
    _asked: int = 0

    def observe(self, predicted: int, reported: int) -> bool:
        """Compare one request's token counts; True if the state changed.

        A negative count is unknown and tells nothing.
        """
        if predicted < 0 or reported < 0:
            return False
        match = predicted == reported
        if match:
            self.matched += 1
        else:
            self.mismatched += 1
            self.last = (predicted, reported)
        self._run = self._run + 1 if match == self._run_matches else 1
        self._run_matches = match
        self._window.append(match)
        del self._window[:-_WINDOW]
        if self.state is Trust.EXACT:
            if match or (self._run < _CONSECUTIVE and self._window.count(False) < _RATE_MINIMUM):
                return False
            self.state = Trust.MISMATCH
            self.relapses += 1
            self._run = 0
            return True
        if not match or self._run < self.recovery_after:
            return False
        self.state = Trust.EXACT
        self._window.clear()
        return True

    @property
    def recovery_after(self) -> int:
        """Matches in a row that restore trust."""
        doublings = min(max(self.relapses - 1, 0), 10)
        return int(min(_RECOVERY * 2**doublings, _RECOVERY_LIMIT))

    def predicts(self) -> bool:
        """Whether to tokenize the next request: always when exact, else every 8th, as a probe.

        A probe's tokens are for `observe` only, not for routing.
        """
        if self.state is Trust.EXACT:
            return True
        self._asked += 1
        return self._asked % _PROBE_EVERY == 1

    @property
    def reason(self) -> str:
        """Why requests are not routed exactly; empty when they are."""
        if self.state is Trust.EXACT or self.last is None:
            return ""
        predicted, reported = self.last
        return (
            f"tokens do not match the engine's: {predicted} predicted, {reported} reported; "
            f"{self.mismatched} of {self.matched + self.mismatched} differed"
        )
