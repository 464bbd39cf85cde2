"""The requests inside the engine, as its own server reports them, and the load they are.

The reports come from the middleware in the engine's process (``engine_side/``). This book turns
them into the stream's events (accepted, first token, finished) and into numbers a cost function
can use. Nothing here does I/O or reads a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_kv_router.stream.format import Accepted, Finished, FirstToken

RequestEvent = Accepted | FirstToken | Finished

LOST = 0  # status of a request whose end was never reported


@dataclass(slots=True)
class Flight:
    """One request in the engine."""

    source: int  # pid of the server process that reported it
    prompt_tokens: int  # as the picker counted them; -1 if it came without a booking
    cached_tokens: int  # the overlap the picker expected; -1 likewise
    first_token: bool = False
    chunks: int = 0  # events streamed so far: at least a token each
    prefillers_failed: tuple[str, ...] = ()  # asked in vain, and not told yet

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens still to be computed, as far as is known."""
        if self.first_token or self.prompt_tokens < 0:
            return 0
        return max(0, self.prompt_tokens - max(self.cached_tokens, 0))

    def blocks(self, block_size: int) -> int:
        """KV blocks its prompt and its answer so far take, shared ones included."""
        return -(-(max(self.prompt_tokens, 0) + self.chunks) // block_size)


class Flights:
    """What is in the engine right now: booking → request, oldest first."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self._dropped: dict[int, int] = {}  # pid -> reports that process could not send
        self._engine_first_tokens = 0.0  # the engine's own count when it was last asked
        self._seen_first_tokens = 0  # first tokens we know of since then
        self.finished = 0
        self.remote_prefills: Counter[str] = Counter()  # outcome -> requests
        self.prefiller_failures = 0  # prefill workers asked in vain

    def __len__(self) -> int:
        return len(self._flights)

    def bookings(self) -> dict[str, Flight]:
        return dict(self._flights)

    @property
    def dropped_reports(self) -> int:
        return sum(self._dropped.values())

    @property
    def prefill_tokens(self) -> int:
        return sum(flight.prefill_tokens for flight in self._flights.values())

    def blocks(self, block_size: int) -> int:
        return sum(flight.blocks(block_size) for flight in self._flights.values())

    def apply(self, report: Sequence[Any]) -> list[RequestEvent]:
        """Take one report (its form: ``dynamo_engine_middleware``); return what it changed."""
        match report:
            case ["a", int(source), str(booking), int(tokens), int(cached)]:
                failed = self._take_failed(self._flights.get(booking))
                self._flights[booking] = Flight(source, tokens, cached, prefillers_failed=failed)
                return [Accepted(booking=booking, prompt_tokens=tokens, cached_tokens=cached)]
            case ["f", int(_), str(booking)]:
                return self._first_token(booking)
            case ["d", int(_), str(booking), int(prompt), int(cached), int(answer), int(status)]:
                return self._finish(booking, prompt, cached, answer, status)
            case ["t", int(source), int(dropped), dict(progress)]:
                self._dropped[source] = dropped
                return self._progress(source, progress)
            case ["p", int(_), str(booking), str(outcome), list(failed)]:
                self.remote_prefills[outcome] += 1
                self.prefiller_failures += len(failed)
                if (flight := self._flights.get(booking)) is not None:
                    flight.prefillers_failed = tuple(map(str, failed))
                return []
        raise ValueError(f"unknown report from the engine: {report!r:.200}")

    def _first_token(self, booking: str) -> list[RequestEvent]:
        flight = self._flights.get(booking)
        if flight is None or flight.first_token:
            return []
        flight.first_token = True
        self._seen_first_tokens += 1
        return [FirstToken(booking=booking, prefillers_failed=self._take_failed(flight))]

    @staticmethod
    def _take_failed(flight: Flight | None) -> tuple[str, ...]:
        """Its prefill workers that were asked in vain, to be told once."""
        if flight is None:
            return ()
        failed, flight.prefillers_failed = flight.prefillers_failed, ()
        return failed

    def _finish(
        self, booking: str, prompt: int, cached: int, answer: int, status: int
    ) -> list[RequestEvent]:
        flight = self._flights.pop(booking, None)
        if flight is None:
            return []
        if not flight.first_token and status == 200:
            self._seen_first_tokens += 1
        self.finished += 1
        return [
            Finished(
                booking=booking,
                prompt_tokens=prompt,
                cached_tokens=cached,
                completion_tokens=answer,
                status=status,
                prefillers_failed=self._take_failed(flight),
            )
        ]

    def _progress(self, source: int, progress: dict[str, int]) -> list[RequestEvent]:
        """A process lists all it has in flight. Where a report was lost, the list is right."""
        events: list[RequestEvent] = []
        for booking, chunks in progress.items():
            flight = self._flights.get(booking)
            if flight is None:
                flight = self._flights[booking] = Flight(source, -1, -1)
                events.append(Accepted(booking=booking, prompt_tokens=-1, cached_tokens=-1))
            flight.chunks = chunks
            if chunks:
                events += self._first_token(booking)
        gone = [
            booking
            for booking, flight in self._flights.items()
            if flight.source == source and booking not in progress
        ]
        for booking in gone:
            events += self._finish(booking, -1, -1, -1, LOST)
        return events

    def engine_counted(self, first_tokens: float) -> list[RequestEvent]:
        """Find the requests that are decoding although their response shows nothing yet.

        A response that isn't streamed has no visible first token, so its prompt would count as
        prefill until it ends. The engine counts first tokens of all requests
        (``vllm:time_to_first_token_seconds_count``): as many as it counted since the last call
        and we did not see belong to the oldest requests still taken for prefill, because the
        scheduler admits in order of arrival.
        """
        unseen = int(first_tokens - self._engine_first_tokens) - self._seen_first_tokens
        self._engine_first_tokens = first_tokens
        waiting = [name for name, flight in self._flights.items() if not flight.first_token]
        events: list[RequestEvent] = []
        for booking in waiting[: max(0, unseen)]:
            events += self._first_token(booking)
        self._seen_first_tokens = max(0, -unseen)  # seen by us before the engine counted them
        return events
