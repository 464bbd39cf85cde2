"""What became of requests, from whoever tells: streams that end, workers, the proxy's log.

Each has its own moment and its own part of the truth; all of it goes into the request's journal
entry, the metrics, the circuits of the workers and the accounts of the gate.

A request is told of in full when its stream has ended and its worker has said its last word, or
``LATE_S`` after the stream; where a proxy of ours writes an access log, that has the last word.
"""

from __future__ import annotations

from collections.abc import Callable

from dynamo_kv_router.stream.format import Finished
from dynamo_runtime.tracing import Tracing

from dynamo_epp.admission.gate import Gate
from dynamo_epp.endpoints.circuits import Circuits
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.explain import Entry, Journal, Refused, request_log, spans
from dynamo_epp.extproc import PickRequest, Refusal, Route
from dynamo_epp.metrics import PickerMetrics
from dynamo_epp.picker.bookings import Booking, Bookings
from dynamo_epp.picker.reading import Asked, PromptTokens
from dynamo_epp.picker.refusals import message_of, reason_of
from dynamo_epp.scheduling.disagg import PREFILL
from dynamo_epp.server import AccessEntry

REFUSED_BY_ENGINE = (400, 404, 413, 422)
"""Statuses of requests that an engine did nothing for."""
LEFT_EARLY = 499
"""What a worker calls an answer whose client went before its end."""


class Outcomes:
    """Takes what is told of one picker's requests. The options are those of ``KvPicker``."""

    def __init__(
        self,
        pool: Pool,
        bookings: Bookings,
        tokenization: PromptTokens,
        metrics: PickerMetrics,
        journal: Journal,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        access_log: bool,
        relays: bool,
        tracing: Tracing | None,
        gate: Gate | None,
        circuits: Circuits | None,
    ) -> None:
        self._pool = pool
        self._bookings = bookings
        self._tokenization = tokenization
        self._metrics = metrics
        self._journal = journal
        self._clock = clock
        self._wall = wall
        self._access_log = access_log
        self._relays = relays
        self._tracing = tracing
        self._gate = gate
        self._circuits = circuits
        self._open: dict[str, Entry] = {}  # by request id; their streams have not ended

    # --- told by the picker

    def routed(self, entry: Entry) -> None:
        """A request goes to a worker."""
        self._open[entry.request_id] = entry
        metrics = self._metrics.model(entry.model)
        metrics.started.inc()
        metrics.active.inc()

    def refused(self, request: PickRequest, asked: Asked, answer: Refusal) -> None:
        """A request was answered by the picker itself, or did not wait for its answer."""
        reason = reason_of(answer)
        headers, entry, parsed = request.head.headers, asked.entry, asked.parsed
        if entry is not None and parsed is not None:
            entry.outcome |= {"status": answer.status, "dropped_reason": reason}
            if self._tracing is not None:
                spans.decided(self._tracing, headers, entry, parsed, self._wall(), reason)
            if self._relays and self._access_log:
                request_log.ended(entry)
            return
        refused = Refused(
            request_id=asked.request_id,
            time=self._wall(),
            path=asked.path,
            model=parsed.model if parsed is not None else "",
            reason=reason,
            message=message_of(answer),
            tenant=asked.tenant,
            stages_ms=asked.stages_ms(self._clock()),
            outcome={"status": answer.status, "dropped_reason": reason},
        )
        self._journal.refuse(refused)
        if self._tracing is not None:
            spans.refused(self._tracing, headers, refused)
        if self._relays and self._access_log:
            request_log.ended(refused)

    # --- told by the stream of the request

    def answered(self, route: Route) -> None:
        """The answer has begun; the gateway says from where."""
        booking = route.booking
        if not isinstance(booking, Booking):
            return
        served = next((w for w in self._pool.workers.values() if w.hostport == route.served), None)
        if served is not None and served is not booking.worker:  # the gateway went down the list
            if self._circuits is not None and route.served in route.endpoints:
                why, now = "the gateway went on to the next endpoint", self._clock()
                self._circuits.failed(booking.worker, "request", why, now, began=booking.picked_at)
            booking.worker.load.release(booking.key)
            booking.worker = served
            booking.entry.outcome["served_by"] = served.name
            if served.stock:  # ours have counted it by themselves
                served.load.book(booking.key, booking.prompt_tokens, 0, self._clock())

    def released(self, route: Route) -> None:
        """The request has ended, in whatever way."""
        booking = route.booking
        if not isinstance(booking, Booking):
            return
        entry, now = booking.entry, self._clock()
        if self._circuits is not None:
            self._circuits.released(booking.worker, now)
        if self._gate is not None:
            self._gate.kick()
        self._metrics.model(entry.model).active.dec()
        if self._open.get(entry.request_id) is entry:
            del self._open[entry.request_id]
            self._journal.keep(entry)
        if booking.prefill is not None:
            if self._circuits is not None:
                self._circuits.released(booking.prefill.worker, now)
            self._bookings.close(booking.prefill, now)
        if self._relays:
            self._relayed(route, booking)
        if self._bookings.close(booking, now):
            self._ended(booking)
        for late in self._bookings.overdue(now):
            if not late.half:
                self._ended(late)

    def _relayed(self, route: Route, booking: Booking) -> None:
        """The answer has passed through here, as far as the gateway shows it."""
        outcome, metrics = booking.entry.outcome, self._metrics.model(booking.entry.model)
        seconds = self._clock() - booking.picked_at
        outcome["duration_s"] = round(seconds, 6)
        metrics.duration.observe(seconds)
        if route.unseen and not route.status:
            booking.untold = True
            return
        outcome["status"] = route.status
        if route.served:
            outcome["upstream"] = route.served
        if route.status in REFUSED_BY_ENGINE:
            self._used(booking, 0)
        result = "error" if route.status >= 400 else "success"
        if not route.complete and result == "success":
            result = "cancelled"  # as a rule because the client left; the relay can't tell
        metrics.ended(booking.entry.path, booking.entry.stream, result)
        chosen = booking.entry.kept.chosen
        if route.served and (chosen is None or chosen.candidate.endpoint != route.served):
            self._metrics.missed.labels("retried").inc()
        if self._circuits is not None:
            endpoint = route.served or route.endpoints[0]
            # An answer that broke off is no success; whose fault it was is not known here.
            status = route.status if route.complete or route.status >= 500 else 0
            self._circuits.relayed(endpoint, status, self._clock(), booking.picked_at)

    # --- told by workers

    def accepted(self, worker: Worker, key: str, blind_window_s: float | None) -> None:
        """``worker`` has the request, ``blind_window_s`` after the pick if that is known."""
        booking = self._bookings.get(key)
        if booking is None:
            return
        if booking.worker is not worker:  # the proxy went down the list
            booking.worker.load.release(key)
            booking.worker = worker
            if not booking.half:
                booking.entry.outcome["served_by"] = worker.name
        if booking.half:
            booking.entry.outcome["prefilled_by"] = worker.name
        elif blind_window_s is not None:
            self._metrics.blind_window.observe(blind_window_s)
            booking.entry.outcome["blind_window_s"] = round(blind_window_s, 6)

    def first_token(self, worker: Worker, key: str) -> None:
        """The answer has begun."""
        booking = self._bookings.get(key)
        if booking is not None and not booking.half:
            if booking.prefill is not None:  # whoever did it, the prompt is computed
                booking.prefill.worker.load.release(booking.prefill.key)
            now = self._clock()
            seconds = now - booking.picked_at
            if self._circuits is not None:
                self._circuits.succeeded(worker, "request", now, began=booking.picked_at)
                self._prefilled(booking, now)
            self._metrics.model(booking.entry.model).ttft.observe(seconds)
            booking.entry.outcome["first_token_s"] = round(seconds, 6)

    def prefillers_failed(self, key: str, addresses: tuple[str, ...]) -> None:
        """The decode worker of the request asked those prefill workers (``ip:port``) in vain."""
        booking, now = self._bookings.get(key), self._clock()
        if booking is None or booking.prefill is None:
            return
        failed = [
            worker
            for worker in self._pool.workers.values()
            if worker.hostport in addresses and worker.endpoint.role == PREFILL
        ]
        booking.entry.outcome["prefillers_failed"] = [worker.name for worker in failed]
        if self._circuits is not None:
            for worker in failed:
                why = "no prefill came of it"
                self._circuits.failed(worker, "request", why, now, began=booking.picked_at)

    def _prefilled(self, booking: Booking, now: float) -> None:
        """There is an answer: the prefill worker that took the request did its part, unless the
        decode worker said otherwise."""
        outcome = booking.entry.outcome
        if booking.prefill is None or self._circuits is None:
            return
        worker = booking.prefill.worker
        accepted = outcome.get("prefilled_by") == worker.name
        if accepted and worker.name not in outcome.get("prefillers_failed", ()):
            self._circuits.succeeded(worker, "request", now, began=booking.picked_at)

    def finished(self, worker: Worker, event: Finished) -> None:
        """The worker's last word: what the request took."""
        if self._gate is not None:
            self._gate.kick()
        booking = self._bookings.get(event.booking)
        if booking is None or (booking.half and event.status != 200):
            return  # the decode worker goes on to the next prefill worker
        self._bookings.pop(event.booking)
        entry, model = booking.entry, booking.entry.model
        booking.status = event.status
        if booking.half:
            entry.outcome["prefill_s"] = round(self._clock() - booking.picked_at, 6)
            if event.cached_tokens >= 0:
                entry.outcome["prefill_cached_tokens"] = event.cached_tokens
            return
        if event.status == 200 and "first_token_s" not in entry.outcome:  # it was not streamed
            self._prefilled(booking, self._clock())
        used = (event.prompt_tokens, event.completion_tokens)
        if min(used) >= 0:
            self._used(booking, sum(used))
        elif event.status in REFUSED_BY_ENGINE:
            self._used(booking, 0)
        if event.prompt_tokens >= 0:
            entry.outcome["prompt_tokens"] = event.prompt_tokens
        if event.cached_tokens >= 0:
            entry.outcome["cached_tokens"] = event.cached_tokens
            self._metrics.model(model).cached_tokens.observe(event.cached_tokens)
        if event.completion_tokens >= 0:
            entry.outcome["completion_tokens"] = event.completion_tokens
            self._metrics.model(model).output_tokens.observe(event.completion_tokens)
        if entry.prompt_tokens >= 0 and event.status == 200:
            self._tokenization.check(
                worker, model, booking.kind, entry.prompt_tokens, event.prompt_tokens
            )
        if not booking.open:
            self._ended(booking)

    def lost(self, worker: Worker, reason: str) -> None:
        """The worker's stream broke off."""
        self._metrics.lost.inc()
        if self._circuits is not None and worker.live:  # else it is still the same loss
            self._circuits.failed(worker, "stream", f"stream lost: {reason}", self._clock())
        self.unseen(worker)

    def unseen(self, worker: Worker) -> None:
        """What the worker does not have in hand now ended without a word."""
        for booking in self._bookings.unseen(worker):
            if not booking.half:
                self._ended(booking)

    def _used(self, booking: Booking, tokens: int) -> None:
        if self._gate is not None and booking.admitted is not None:
            self._gate.used(booking.admitted, tokens)

    # --- told by the proxy's access log

    def logged(self, logged: AccessEntry) -> None:
        """How a request went that the proxy saw to its end, whether it was picked for or not."""
        entry = self._open.get(logged.request_id) or self._journal.get(logged.request_id)
        if entry is None:
            self._refused_or_unknown(logged)
            return
        outcome = entry.outcome
        outcome["status"] = logged.status
        outcome["upstream"] = logged.upstream
        outcome["attempts"] = logged.attempts
        if logged.flags:
            outcome["flags"] = ",".join(logged.flags)
        if logged.last_byte_s is not None:
            outcome["duration_s"] = round(logged.last_byte_s, 6)
            self._metrics.model(entry.model).duration.observe(logged.last_byte_s)
        self._metrics.model(entry.model).ended(entry.path, entry.stream, _result(logged))
        chosen = entry.kept.chosen
        if self._circuits is not None and chosen is not None:
            first = (chosen.candidate.endpoint,)
            order = entry.decision.endpoints if logged.attempts > 1 else first
            self._circuits.logged(logged, order, self._clock())
        if logged.upstream and (chosen is None or logged.upstream != chosen.candidate.endpoint):
            self._metrics.missed.labels("retried" if logged.attempts > 1 else "unknown").inc()
        if self._access_log:
            request_log.ended(entry)

    def _refused_or_unknown(self, logged: AccessEntry) -> None:
        if self._access_log:
            refused = self._journal.find(logged.request_id)
            if refused is not None:
                request_log.ended(refused)
            else:
                request_log.ended_in_the_proxy(logged)

    # --- told by nobody any more

    def _ended(self, booking: Booking) -> None:
        """All is told that will be. Behind a proxy of ours its log has the last word instead."""
        if booking.untold:
            self._judge(booking)
        if self._relays and self._access_log:
            request_log.ended(booking.entry)

    def _judge(self, booking: Booking) -> None:
        """How a request ended whose answer nobody saw but its worker."""
        entry, status = booking.entry, booking.status
        result = "unavailable"
        if status:
            entry.outcome["status"] = status
            result = "success" if status < 400 else "error"
        if status == LEFT_EARLY:
            result = "cancelled"
        elif self._circuits is not None:
            self._circuits.relayed(
                booking.worker.hostport, status, self._clock(), booking.picked_at
            )
        self._metrics.model(entry.model).ended(entry.path, entry.stream, result)


def _result(logged: AccessEntry) -> str:
    """A stream that broke off had status 200, too; only Envoy's flags tell."""
    if not logged.flags:
        return "success" if 200 <= logged.status < 400 else "error"
    left = all(flag.startswith("downstream_") for flag in logged.flags)
    return "cancelled" if left else "error"
