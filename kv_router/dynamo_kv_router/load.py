"""How busy each worker is, from the workers' own words.

A worker's stream tells when a request was accepted, gave its first token and ended, whichever
picker sent it; that is the truth. Between a pick and its acceptance nobody but the picker knows
of it, so the picker books the request under a key of its own until the worker confirms it. That
blind window is short and measured; with several pickers each multiplies its unconfirmed bookings
by their number, as the others are probably just as far ahead of what the worker says.

Stock engines confirm nothing: there a booking lives until its stream ends, its prefill is taken as
done after an estimated time, and what other pickers sent is known only from the engine's figures:
what they count beyond this picker's own requests at that moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dynamo_kv_router.engine_metrics import EngineFigures

STALE_S = 5.0
"""Seconds after which an engine's figures are not believed any more. Engines are asked twice a
second, ours tell once a second: five missed in a row are no accident."""
UNTOLD = EngineFigures(0, 0, 0.0, 0.0)
"""Figures of an engine that has told none."""

STOCK_PREFILL_TOKENS_PER_S = 10_000.0
"""The prefill speed assumed of an engine that reports none. It only shapes the decay of bookings
on stock engines, whose prefill would otherwise count until the last token."""

SAME_FIGURES_S = 0.1
"""Equal figures of an engine that are less apart than this are the same ones, told twice."""


@dataclass(slots=True)
class _Request:
    prefill_tokens: int  # uncached prompt tokens; 0 once the first token came
    decode_blocks: int
    booked_at: float  # seconds, the caller's clock


@dataclass(slots=True)
class WorkerLoad:
    """What one worker has in hand.

    Invariant: the sums equal the sums over ``accepted`` and ``booked``.
    """

    block_size: int
    confirms: bool  # the worker's stream reports acceptances
    pickers: int = 1
    draining: bool = False
    figures: EngineFigures = UNTOLD  # the engine's own, as published or scraped
    waiting: int = 0  # of ``figures``: the engine's own queue
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    observed_at: float | None = None  # when the engine's own figures were taken; None: never
    in_hand_then: float = 0.0  # active requests at that time
    others_requests: int = 0  # stock: in the engine's figures, but not from this picker
    others_blocks: int = 0
    accepted: dict[str, _Request] = field(default_factory=dict)  # booking key -> request
    booked: dict[str, _Request] = field(default_factory=dict)  # not confirmed yet
    accepted_prefill_tokens: int = 0
    accepted_decode_blocks: int = 0
    booked_prefill_tokens: int = 0
    booked_decode_blocks: int = 0

    def observe(
        self, figures: EngineFigures, kv_blocks_used: int, kv_blocks_total: int, at: float
    ) -> None:
        """The engine's own figures, taken at ``at`` (seconds, the caller's clock).

        Workers send the same figures again when something else changed; those are known already.
        """
        if (
            self.observed_at is not None
            and at - self.observed_at < SAME_FIGURES_S
            and (self.figures, self.kv_blocks_total) == (figures, kv_blocks_total)
        ):
            return
        self.figures, self.waiting, self.observed_at = figures, figures.waiting, at
        self.kv_blocks_used, self.kv_blocks_total = kv_blocks_used, kv_blocks_total
        if not self.confirms:
            counted = figures.running + figures.waiting
            self.others_requests = max(0, counted - len(self.booked))
            self.others_blocks = max(0, kv_blocks_used - self.booked_decode_blocks)
        self.in_hand_then = self.active_requests()

    def forget_figures(self) -> None:
        """The engine tells none any more."""
        self.figures, self.observed_at, self.in_hand_then = UNTOLD, None, 0.0
        self.waiting = self.kv_blocks_used = self.others_requests = self.others_blocks = 0

    def age(self, now: float) -> float | None:
        """Seconds since the engine's figures were true; None: it never told any."""
        return None if self.observed_at is None else now - self.observed_at

    def told_lately(self, now: float) -> bool:
        """Whether they may be believed."""
        return self.observed_at is not None and now - self.observed_at <= STALE_S

    def grow_old(self, now: float) -> None:
        """The engine can't be asked at the moment. What it told last is believed for ``STALE_S``;
        then what other pickers had sent there by that time has probably ended."""
        if not self.told_lately(now):
            self.others_requests = self.others_blocks = 0

    def _blocks(self, tokens: int) -> int:
        return -(-max(tokens, 0) // self.block_size)

    def book(self, key: str, prompt_tokens: int, cached_tokens: int, now: float) -> None:
        """A pick sent to this worker: ``prompt_tokens``, of which ``cached_tokens`` are cached."""
        request = _Request(max(0, prompt_tokens - cached_tokens), self._blocks(prompt_tokens), now)
        self._drop_booking(key)
        self.booked[key] = request
        self.booked_prefill_tokens += request.prefill_tokens
        self.booked_decode_blocks += request.decode_blocks

    def _drop_booking(self, key: str) -> _Request | None:
        request = self.booked.pop(key, None)
        if request is not None:
            self.booked_prefill_tokens -= request.prefill_tokens
            self.booked_decode_blocks -= request.decode_blocks
        return request

    def accept(self, key: str, prompt_tokens: int, cached_tokens: int, now: float) -> float | None:
        """The worker has the request. Returns the blind window in seconds if we had booked it.

        ``prompt_tokens`` −1 (the worker can't know) keeps what the booking said.
        """
        booking = self._drop_booking(key)
        self.finish(key)
        if prompt_tokens >= 0:
            request = _Request(
                max(0, prompt_tokens - max(cached_tokens, 0)), self._blocks(prompt_tokens), now
            )
        elif booking is not None:
            request = _Request(booking.prefill_tokens, booking.decode_blocks, now)
        else:
            request = _Request(0, 0, now)
        self.accepted[key] = request
        self.accepted_prefill_tokens += request.prefill_tokens
        self.accepted_decode_blocks += request.decode_blocks
        return now - booking.booked_at if booking is not None else None

    def first_token(self, key: str) -> None:
        """The prefill of the request is done."""
        request = self.accepted.get(key)
        if request is not None:
            self.accepted_prefill_tokens -= request.prefill_tokens
            request.prefill_tokens = 0

    def finish(self, key: str) -> None:
        """The request has ended, however it ended."""
        request = self.accepted.pop(key, None)
        if request is not None:
            self.accepted_prefill_tokens -= request.prefill_tokens
            self.accepted_decode_blocks -= request.decode_blocks

    def release(self, key: str) -> None:
        """The picker's stream for this request has ended.

        Only the booking goes: a request that the worker accepted ends when the worker says so.
        """
        self._drop_booking(key)

    def reset_accepted(self) -> None:
        """Forget what the worker said (a snapshot follows, or the worker restarted)."""
        self.accepted.clear()
        self.accepted_prefill_tokens = 0
        self.accepted_decode_blocks = 0

    def active_prefill_tokens(self, now: float) -> float:
        """Uncached prompt tokens still to compute, unconfirmed ones scaled by the pickers."""
        if self.confirms:
            return self.accepted_prefill_tokens + self.pickers * self.booked_prefill_tokens
        return sum(
            max(0.0, r.prefill_tokens - (now - r.booked_at) * STOCK_PREFILL_TOKENS_PER_S)
            for r in self.booked.values()
        )

    def active_decode_blocks(self) -> float:
        """Blocks held by running requests."""
        if self.confirms:
            return self.accepted_decode_blocks + self.pickers * self.booked_decode_blocks
        return self.booked_decode_blocks + self.others_blocks

    def active_requests(self) -> float:
        """Requests in hand."""
        if self.confirms:
            return len(self.accepted) + self.pickers * len(self.booked)
        return len(self.booked) + self.others_requests


def pickers_seen(loads: Iterable[WorkerLoad]) -> float:
    """As how many pickers like this one the load of the stock engines among ``loads`` looks, at
    least 1: ``(requests in hand + 1) / (this picker's own + 1)``.

    Nobody tells how many pickers there are, and not all get as much traffic. Over all engines
    together, as the requests of one are few; the 1s are for pools in which hardly any are.
    """
    own = others = 0
    for load in loads:
        if not load.confirms:
            own += len(load.booked)
            others += load.others_requests
    return 1.0 + others / (own + 1)
