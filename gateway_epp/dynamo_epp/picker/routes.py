"""From a decision to the proxy's answer: the load booked for it, and the headers that say so.

Everything that can fail comes before the first booking: one whose route is never returned would
never be released.
"""

from __future__ import annotations

from collections.abc import Callable

from dynamo_kv_router.choice import Decision, RequestSize, Scored
from dynamo_runtime.prefill_grant import PREFILL_BOOKING, Grant

from dynamo_epp.admission.gate import Admitted
from dynamo_epp.endpoints.circuits import Circuits
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.explain import Entry
from dynamo_epp.extproc import Route
from dynamo_epp.picker.bookings import BOOKING_HEADER, Booking, Bookings
from dynamo_epp.requests import Kind, ParsedRequest
from dynamo_epp.scheduling.disagg import Pairing, Split
from dynamo_epp.scheduling.scheduler import Scheduler

RANK_HEADER = "x-data-parallel-rank"
"""vLLM's: which of the ranks behind its port computes the request."""
GRANT_S = 60
"""How long a decode worker may take to begin with what it is allowed. Longer than a request is on
its way to it and clocks differ, short enough that a header seen elsewhere is soon worth nothing."""
PREFILLERS = 4
"""Prefill workers named in a grant."""


class Routes:
    """Books decisions and makes routes of them. ``fallbacks``: endpoints named behind the first
    one. ``secret`` signs what decode workers may ask of prefill workers; ``enforce`` forbids them
    to do without. ``wall`` gives Unix seconds."""

    def __init__(
        self,
        pool: Pool,
        bookings: Bookings,
        *,
        circuits: Circuits | None,
        scheduler: Scheduler | None,
        fallbacks: int,
        enforce: bool,
        secret: bytes | None,
        wall: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._bookings = bookings
        self._circuits = circuits
        self._scheduler = scheduler
        self._fallbacks = fallbacks
        self._enforce = enforce
        self._secret = secret
        self._wall = wall

    def book(
        self,
        key: str,
        parsed: ParsedRequest,
        named: str,
        changed: bytes | None,
        pairing: Pairing,
        entry: Entry,
        admitted: Admitted | None,
        now: float,
    ) -> Route:
        """The route of a pairing that has a worker, booked under ``key`` at ``now`` (monotonic
        seconds). ``named``: the model, as the client says it; ``changed``: the body, if it is
        another one."""
        decision = pairing.decode
        assert decision.chosen is not None
        worker, cached = self._cached(decision.chosen, decision.size)
        prompt = decision.size.prompt_tokens
        endpoints, rank = decision.endpoints, worker.rank(decision.chosen.candidate.rank)
        answer_headers = self._scheduler.answer_headers(decision) if self._scheduler else ()
        prefill: Booking | None = None
        grant: tuple[tuple[str, str], ...] = ()
        if pairing.split is Split.PREFILL_DECODE and pairing.prefill is not None:
            prefill, grant = self._book_prefill(
                key, cached, parsed.kind, pairing.prefill, entry, now
            )
            cached = prompt  # this worker has nothing of it to compute
        worker.load.book(key, prompt, cached, now)
        if entry.prompt_tokens >= 0:
            entry.predicted_cached_tokens = cached
        headers = [(BOOKING_HEADER, f"{key};tokens={prompt};cached={cached}"), *grant]
        if rank is not None:
            rank.booked += 1
            headers.append((RANK_HEADER, str(rank.number)))
            endpoints = self._with_rank(decision, rank.number)
        booking = Booking(
            key, parsed.kind, worker, entry, now, prompt,
            admitted=admitted, prefill=prefill, rank=rank,
        )  # fmt: skip
        if self._circuits is not None:
            self._circuits.picked(worker, now)
        self._bookings.add(booking)
        if admitted is not None:
            admitted.booked = True
        rewritten = parsed.model not in ("", named)
        return Route(
            endpoints=endpoints[: decision.limit or 1 + self._fallbacks],
            set_headers=tuple(headers),
            body=changed,
            response_headers=answer_headers,
            restore_model=(parsed.model, named) if rewritten else None,
            routing=pairing.routing(),
            booking=booking,
        )

    def _with_rank(self, decision: Decision, number: int) -> tuple[str, ...]:
        """The endpoints that have this rank: others refuse a request for it."""
        return tuple(
            scored.candidate.endpoint
            for scored in decision.ranked
            if self._pool.workers[scored.candidate.name].rank(number) is not None
        )

    def _cached(self, scored: Scored, size: RequestSize) -> tuple[Worker, int]:
        """The worker and the prompt tokens that it caches."""
        worker = self._pool.workers[scored.candidate.name]
        tokens = scored.candidate.overlap_blocks * max(1, worker.block_size)
        return worker, min(tokens, size.prompt_tokens)

    def _book_prefill(
        self, key: str, local: int, kind: Kind, prefill: Decision, entry: Entry, now: float
    ) -> tuple[Booking, tuple[tuple[str, str], ...]]:
        """Book the prefill worker; also, the headers that let the decode worker ask it.

        ``local`` are the prompt tokens that the decode worker itself caches.
        """
        assert self._secret is not None
        size = prefill.size
        workers = [self._cached(scored, size) for scored in prefill.ranked[:PREFILLERS]]
        grant = Grant(
            prefillers=tuple(worker.hostport for worker, _ in workers),
            booking=key,
            expires=int(self._wall()) + GRANT_S,
            enforce=self._enforce,
            local_tokens=local,
            cached_tokens=tuple(cached for _, cached in workers),
        )
        headers = grant.headers(self._secret)
        worker, cached = workers[0]
        booking = Booking(
            key + PREFILL_BOOKING, kind, worker, entry, now, size.prompt_tokens, half=True
        )
        worker.load.book(booking.key, size.prompt_tokens, cached, now)
        if self._circuits is not None:
            self._circuits.picked(worker, now)
        self._bookings.add(booking)
        return booking, headers
