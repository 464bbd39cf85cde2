"""The picker: a request in, a ranked list of endpoints out, and a journal of why.

Everything that decides is elsewhere and pure (filters, cost, choice). This module is the order in
which those parts run, the bookings that tie a pick to what the worker says of it later, and the
answers given where no pick is possible.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from dynamo_kv_router.choice import (
    Candidate,
    Decision,
    Policy,
    RequestSize,
    Rng,
    Scored,
    choose,
)
from dynamo_kv_router.extras import block_extras
from dynamo_kv_router.stream.format import Finished, WorkerInfo
from dynamo_runtime.logs import request_id as request_id_of
from dynamo_runtime.prefill_grant import PREFILL_BOOKING, Grant
from dynamo_runtime.tracing import Tracing

from dynamo_epp import request_log, spans
from dynamo_epp.admission.gate import (
    NO_ENDPOINT_RETRY_S,
    NO_ENDPOINTS,
    Admitted,
    Arrival,
    Gate,
    Rejection,
)
from dynamo_epp.compact import Kept
from dynamo_epp.endpoints.circuits import Circuits, told
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Rank, Worker
from dynamo_epp.explain import Disagg, Entry, Journal, Refused
from dynamo_epp.extproc import PickRequest, Refusal, Route
from dynamo_epp.metrics import PickerMetrics
from dynamo_epp.models import NO_RULES, ModelRules
from dynamo_epp.requests import (
    BadRequest,
    Kind,
    ParsedRequest,
    error_body,
    parse,
    prompt_bytes,
    replace_model,
    strip_kv_transfer_params,
    unparsed,
)
from dynamo_epp.scheduling.approximate import ApproximatePrefixes
from dynamo_epp.scheduling.ask import Ask, Prefixes
from dynamo_epp.scheduling.candidates import candidates, overlaps
from dynamo_epp.scheduling.disagg import PREFILL, DisaggPolicy, Pairing, Split, Why, pair
from dynamo_epp.scheduling.filters.subset import OUTSIDE, within
from dynamo_epp.scheduling.scheduler import Scheduler
from dynamo_epp.server import AccessEntry
from dynamo_epp.tokenization import Encoded
from dynamo_epp.tokenize import NotExact

log = logging.getLogger(__name__)

BOOKING_HEADER = "x-dynamo-booking"
RANK_HEADER = "x-data-parallel-rank"
"""vLLM's: which of the ranks behind its port computes the request."""
REASON_HEADER = "x-llm-d-request-dropped-reason"
BYTES_PER_TOKEN = 4
"""Rule of thumb for prompts that were not tokenized; it only sizes the load booked for them."""
DEFAULT_BLOCK_SIZE = 16
CONTENDED_RETRY_S = 1
"""`Retry-After` of a 429 that says nothing better."""
ANSWER_TOKENS = 256
"""Expected of an answer whose length the client does not bound, until the worker tells."""
LONGEST_ANSWER = 131_072
"""Tokens of one answer at most, where no engine has told its limit."""
MOST_ANSWERS = 128
"""Answers to one request (`n`) at most; OpenAI's limit."""
INLINE_BODY = 512 * 1024
"""Bytes; a larger body is parsed beside the loop, where other picks don't wait for it."""
BODILESS = ("/v1/models", "/health", "/ping", "/version")
"""Paths of requests without a body that every worker answers alike, and those below the first."""
LATE_S = 5.0
"""How long after a stream's end the worker's own account of the request is waited for."""
REFUSED_BY_ENGINE = (400, 404, 413, 422)
"""Statuses of requests that an engine did nothing for."""
GRANT_S = 60
"""How long a decode worker may take to begin with what it is allowed. Longer than a request is on
its way to it and clocks differ, short enough that a header seen elsewhere is soon worth nothing."""
PREFILLERS = 4
"""Prefill workers named in a grant."""


def expected_tokens(request: ParsedRequest, max_model_len: int = 0) -> float:
    """What a request will probably take, prompt and answer, before it was tokenized.

    No answer is taken to be longer than ``max_model_len`` (tokens; 0: not known), nor more than
    ``MOST_ANSWERS`` of them: numbers from clients have any size, and what they are charged for may
    be a limit that they share with others.
    """
    answer = ANSWER_TOKENS if request.max_tokens is None else request.max_tokens
    answer = min(max(0, answer), max_model_len or LONGEST_ANSWER)
    return request.body_bytes / BYTES_PER_TOKEN + min(max(1, request.n), MOST_ANSWERS) * answer


LEFT = Refusal(
    499,
    error_body(499, "The client left before there was a pick."),
    ((REASON_HEADER, "rejected-context-cancelled"),),
)
"""What is told of a client that did not wait; nobody gets it as an answer."""


class PromptTokens(Protocol):
    """What a picker needs of ``tokenization.Tokenization``."""

    async def encode(self, request: ParsedRequest, workers: list[Worker]) -> Encoded:
        """Raises ``NotExact``."""
        ...

    def on_described(self, worker: Worker, info: WorkerInfo) -> None: ...

    def check(
        self, worker: Worker, model: str, kind: Kind, predicted: int, reported: int
    ) -> None: ...


@dataclass(slots=True, eq=False)
class Booking:
    """A pick between its answer and the end of its stream."""

    key: str
    kind: Kind
    worker: Worker
    entry: Entry
    picked_at: float  # monotonic seconds
    prompt_tokens: int  # as they count for load
    open: bool = True  # the stream has not ended
    admitted: Admitted | None = None  # how it came in
    prefill: Booking | None = None  # its other half, in a prefill worker
    half: bool = False  # it is such a half
    rank: Rank | None = None  # where it was sent to, if the engine was not left to choose


@dataclass(slots=True, eq=False)
class Asked:
    """A request while its pick is under way."""

    request_id: str
    path: str  # without the query string
    started: float  # monotonic seconds
    named: str = ""  # the model that the client named; a rewrite may have changed ``parsed``
    waited_s: float = 0.0  # at the gate
    tenant: str = ""
    parsed: ParsedRequest | None = None
    entry: Entry | None = None  # once it was decided

    def stages_ms(self, now: float) -> dict[str, float]:
        """What took its time until ``now``, of a request that nothing was chosen for."""
        stages = {"parse": (now - self.started - self.waited_s) * 1e3}
        return stages | ({"queue": self.waited_s * 1e3} if self.waited_s else {})


def _result(logged: AccessEntry) -> str:
    """A stream that broke off had status 200, too; only Envoy's flags tell."""
    if not logged.flags:
        return "success" if 200 <= logged.status < 400 else "error"
    left = all(flag.startswith("downstream_") for flag in logged.flags)
    return "cancelled" if left else "error"


def _message(answer: Refusal) -> str:
    """What an error body tells the client."""
    body: dict[str, dict[str, Any]] = msgspec.json.decode(answer.body)
    return str(body["error"]["message"])


class KvPicker:
    """Chooses among the pool's workers. Implements ``extproc.Picker``.

    ``scheduler`` ranks by a configuration's profiles; without one ``policy`` does.
    ``gate`` holds requests back that may not go yet; without one all of them go at once.
    ``clock`` gives monotonic seconds, ``wall`` Unix seconds; ``replica`` is unique per picker
    process and starts every booking key. A request that comes before the pool is warm waits at
    most ``warm_up_s`` seconds. ``any_path``: requests that can't be understood, or name a model
    that no worker is known to serve, are routed by load instead of refused. ``fallbacks``:
    endpoints named behind the first one, for the proxy to retry on. ``access_log`` writes a line
    for each request. ``relays`` says that answers pass through this process, and that no access log
    of a proxy tells how they ended. ``secret`` signs what decode workers may ask of prefill
    workers.
    """

    def __init__(
        self,
        pool: Pool,
        tokenization: PromptTokens,
        policy: Policy,
        metrics: PickerMetrics,
        journal: Journal,
        *,
        replica: str,
        rng: Rng,
        clock: Callable[[], float],
        wall: Callable[[], float],
        warm_up_s: float = 5.0,
        any_path: bool = False,
        fallbacks: int = 3,
        access_log: bool = False,
        relays: bool = False,
        tracing: Tracing | None = None,
        gate: Gate | None = None,
        circuits: Circuits | None = None,
        scheduler: Scheduler | None = None,
        disagg: DisaggPolicy | None = None,
        secret: bytes | None = None,
    ) -> None:
        self._pool = pool
        self._tokenization = tokenization
        self._policy = policy
        self._metrics = metrics
        self._journal = journal
        self._replica = replica
        self._rng = rng
        self._clock = clock
        self._wall = wall
        self._warm_up_s = warm_up_s
        self._any_path = any_path
        self._fallbacks = fallbacks
        self.rules: ModelRules = NO_RULES
        """What people say of models; replaced whenever that changes."""
        self._access_log = access_log
        self._relays = relays
        self._tracing = tracing
        self._gate = gate
        self._circuits = circuits
        self._scheduler = scheduler
        self._approximate = ApproximatePrefixes()  # for the policy; a scheduler has its own
        self._disagg = disagg or DisaggPolicy()
        self._secret = secret
        self._told_no_secret = False
        self._warmed = False
        self._turn = 0
        self._bookings: dict[str, Booking] = {}  # until the stream and the request both ended
        self._late: deque[tuple[float, Booking]] = deque()  # ended streams, the oldest first
        self._open: dict[str, Entry] = {}  # by request id; their streams have not ended

    # --- extproc.Picker

    async def pick(self, request: PickRequest) -> Route | Refusal:
        request_id = request.head.headers.get("x-request-id", "")
        request_id_of.set(request_id)
        asked = Asked(request_id, request.head.path.partition("?")[0], self._clock())
        try:
            answer = await self._pick(request, asked)
        except asyncio.CancelledError:
            self._tell_refused(request, asked, LEFT)
            raise
        if isinstance(answer, Refusal):
            self._tell_refused(request, asked, answer)
        elif self._tracing is not None and asked.entry is not None and asked.parsed is not None:
            try:
                answer.set_headers += spans.decided(
                    self._tracing, request.head.headers, asked.entry, asked.parsed, self._wall()
                )
            except Exception:  # the pick is booked; without its answer nobody would release it
                log.exception("the span of request %s was not recorded", request_id)
        return answer

    async def _pick(self, request: PickRequest, asked: Asked) -> Route | Refusal:
        try:
            parsed = await self._read(asked.path, request.body)
        except BadRequest as error:
            return self._refuse(
                error.status, error.message, "bad-request", param=error.param, code=error.code
            )
        asked.named = parsed.model
        rule = self.rules.rule(asked.named) if asked.named else None
        if rule is not None:
            parsed = replace(parsed, model=rule.draw(self._rng))
            self._metrics.rewrites.labels(rule.source, parsed.model).inc()
        if self._any_path and not self._pool.serving(parsed.model):
            why = f"no worker is known to serve the model {parsed.model!r}"
            parsed = unparsed(request.body, why)
        asked.parsed = parsed
        if not self._warmed and parsed.prompt is not None:
            # Once only: a worker that stays silent makes decisions approximate, not slow.
            await self._pool.wait_warm(self._warm_up_s)
            self._warmed = True
        if self._gate is None or request.subset == ():  # nothing to wait for
            return await self._choose(request, asked, parsed)
        serving = self._pool.serving(parsed.model)
        if not serving and not self._gate.knows(parsed.model):
            return self._refuse_unserved(parsed.model)
        base = serving[0].model if serving and parsed.model else ""
        longest = max((worker.max_model_len for worker in serving), default=0)
        tokens = expected_tokens(parsed, longest)
        headers = request.head.headers
        arrival = Arrival(parsed.model, base, headers, tokens, parsed.body_bytes)
        arrived = self._clock()
        try:
            admitted = await self._gate.enter(arrival)
        finally:
            asked.waited_s = self._clock() - arrived
        asked.tenant = admitted.tenant
        if isinstance(admitted, Rejection):
            if admitted.reason == NO_ENDPOINTS and self._pool.serving(parsed.model):
                # The choice fails, too, and so keeps what is wrong with each of them.
                return await self._choose(request, asked, parsed)
            return self._reject(admitted)
        with admitted:
            return await self._choose(request, asked, parsed, admitted)

    async def _choose(
        self,
        request: PickRequest,
        asked: Asked,
        parsed: ParsedRequest,
        admitted: Admitted | None = None,
    ) -> Route | Refusal:
        """The pick of a request that may go now."""
        started = asked.started + asked.waited_s
        workers = self._pool.serving(parsed.model)
        if not workers:
            return self._refuse_unserved(parsed.model)
        try:
            changed = self._changed(parsed, asked.named, request.body or b"")
        except BadRequest as error:
            return self._refuse(error.status, error.message, "bad-request", code=error.code)
        parsed_at = self._clock()

        tokens: npt.NDArray[np.uint32] | None = None
        prompt_tokens = -1
        reason = ""
        if self._scheduler is not None and not self._scheduler.reads_prompt:
            reason = "the configured plugins look at no tokens"
        elif self._scheduler is None and self._policy.mode != "kv":
            reason = f"mode {self._policy.mode} looks at no tokens"
        else:
            try:
                encoded = await self._tokenization.encode(parsed, workers)
                prompt_tokens, reason = len(encoded.tokens), encoded.distrust
                if not reason:
                    tokens = encoded.tokens
            except NotExact as error:
                reason = str(error)
            except Exception:  # routing by load is better than no answer
                log.exception("tokenizing failed")
                reason = "tokenizing failed; the picker's log says how"
        tokenized_at = self._clock()

        pairing = self._decide(request, parsed, workers, tokens, tokenized_at)
        decision = pairing.decode
        if not reason and decision.how != "exact":
            reason = self._why_approximate(decision)
        entry = asked.entry = Entry(
            request_id=asked.request_id,
            time=self._wall(),
            path=asked.path,
            model=parsed.model,
            stream=parsed.stream,
            kept=Kept.of(decision),
            disagg=Disagg.of(pairing),
            reason=reason,
            prompt_tokens=prompt_tokens,
            stages_ms={
                "parse": (parsed_at - started) * 1e3,
                **({"queue": asked.waited_s * 1e3} if asked.waited_s else {}),
                "tokenize": (tokenized_at - parsed_at) * 1e3,
            },
            tenant=asked.tenant,
        )
        self._journal.add(entry)
        if pairing.why is Why.NO_SECRET and not self._told_no_secret:
            self._told_no_secret = True
            log.error(
                "no DYN_PD_SECRET or DYN_PD_SECRET_FILE: prefill workers can't be named, decode "
                "workers do both phases or, with --enforce-disagg, nobody does"
            )
        if pairing.split is not None and decision.chosen is not None:
            label = self._metrics.label(parsed.model)
            self._metrics.disagg.labels(label, pairing.split, pairing.why or "").inc()
        if decision.chosen is None:
            return self._refuse_unroutable(parsed.model, decision)
        if pairing.split is Split.REFUSED:
            return self._refuse_unsplit(parsed.model, pairing)
        route = self._route(parsed, asked.named, changed, pairing, entry, admitted)
        done = self._clock()
        entry.stages_ms["choose"] = (done - tokenized_at) * 1e3
        self._count(entry, pairing, done - started)
        return route

    def answered(self, route: Route) -> None:
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
            self._close(booking.prefill, now)
        if self._relays:
            self._relayed(route, booking)
        if self._close(booking, now):
            self._ended(entry)
        while self._late and now - self._late[0][0] >= LATE_S:
            _, late = self._late.popleft()
            running = late.key in late.worker.load.accepted
            if not running and self._bookings.pop(late.key, None) is not None and not late.half:
                self._ended(late.entry)

    def _close(self, booking: Booking, now: float) -> bool:
        """The stream has ended. Whether nobody will tell any more of this booking."""
        booking.open = False
        booking.worker.load.release(booking.key)
        if booking.rank is not None:
            booking.rank.booked -= 1
        if booking.worker.stock:
            self._bookings.pop(booking.key, None)
        elif booking.key in self._bookings:
            # Short requests end before their worker's word of them is here.
            self._late.append((now, booking))
            return False
        return True

    # --- endpoints.streams.RequestWatcher

    def on_accepted(self, worker: Worker, key: str, blind_window_s: float | None) -> None:
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

    def on_first_token(self, worker: Worker, key: str) -> None:
        booking = self._bookings.get(key)
        if booking is not None and not booking.half:
            if booking.prefill is not None:  # whoever did it, the prompt is computed
                booking.prefill.worker.load.release(booking.prefill.key)
            now = self._clock()
            seconds = now - booking.picked_at
            if self._circuits is not None:
                self._circuits.succeeded(worker, "request", now, began=booking.picked_at)
            self._metrics.model(booking.entry.model).ttft.observe(seconds)
            booking.entry.outcome["first_token_s"] = round(seconds, 6)

    def on_finished(self, worker: Worker, event: Finished) -> None:
        if self._gate is not None:
            self._gate.kick()
        booking = self._bookings.pop(event.booking, None)
        if booking is None:
            return
        entry, model = booking.entry, booking.entry.model
        if booking.half:
            entry.outcome["prefill_s"] = round(self._clock() - booking.picked_at, 6)
            if event.cached_tokens >= 0:
                entry.outcome["prefill_cached_tokens"] = event.cached_tokens
            return
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
            self._ended(entry)

    def _used(self, booking: Booking, tokens: int) -> None:
        if self._gate is not None and booking.admitted is not None:
            self._gate.used(booking.admitted, tokens)

    def on_described(self, worker: Worker, info: WorkerInfo) -> None:
        self._tokenization.on_described(worker, info)

    def on_lost(self, worker: Worker, reason: str) -> None:
        self._metrics.lost.inc()
        if self._circuits is not None and worker.live:  # else it is still the same loss
            self._circuits.failed(worker, "stream", f"stream lost: {reason}", self._clock())
        self.on_resynced(worker)

    def on_resynced(self, worker: Worker) -> None:
        # Nobody will tell how these ended.
        for key, booking in list(self._bookings.items()):
            if booking.worker is worker and not booking.open and key not in worker.load.accepted:
                del self._bookings[key]
                if not booking.half:
                    self._ended(booking.entry)

    # --- the proxy's access log

    def on_access_log(self, logged: AccessEntry) -> None:
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

    # --- telling how requests went

    def _tell_refused(self, request: PickRequest, asked: Asked, answer: Refusal) -> None:
        reason = dict(answer.headers).get(REASON_HEADER, "refused")
        headers, entry, parsed = request.head.headers, asked.entry, asked.parsed
        if entry is not None and parsed is not None:
            entry.outcome |= {"status": answer.status, "dropped_reason": reason}
            if self._tracing is not None:
                spans.decided(self._tracing, headers, entry, parsed, self._wall(), reason)
            if self._relays:
                self._ended(entry)
            return
        refused = Refused(
            request_id=asked.request_id,
            time=self._wall(),
            path=asked.path,
            model=parsed.model if parsed is not None else "",
            reason=reason,
            message=_message(answer),
            tenant=asked.tenant,
            stages_ms=asked.stages_ms(self._clock()),
            outcome={"status": answer.status, "dropped_reason": reason},
        )
        self._journal.refuse(refused)
        if self._tracing is not None:
            spans.refused(self._tracing, headers, refused)
        if self._relays and self._access_log:
            request_log.ended(refused)

    def _relayed(self, route: Route, booking: Booking) -> None:
        """The answer has passed through here, and nobody else will tell."""
        outcome = booking.entry.outcome
        outcome["status"] = route.status
        seconds = self._clock() - booking.picked_at
        outcome["duration_s"] = round(seconds, 6)
        if route.served:
            outcome["upstream"] = route.served
        if route.status in REFUSED_BY_ENGINE:
            self._used(booking, 0)
        result = "error" if route.status >= 400 else "success"
        if not route.complete and result == "success":
            result = "cancelled"  # as a rule because the client left; the relay can't tell
        metrics = self._metrics.model(booking.entry.model)
        metrics.duration.observe(seconds)
        metrics.ended(booking.entry.path, booking.entry.stream, result)
        chosen = booking.entry.kept.chosen
        if route.served and (chosen is None or chosen.candidate.endpoint != route.served):
            self._metrics.missed.labels("retried").inc()
        if self._circuits is not None:
            endpoint = route.served or route.endpoints[0]
            # An answer that broke off is no success; whose fault it was is not known here.
            status = route.status if route.complete or route.status >= 500 else 0
            self._circuits.relayed(endpoint, status, self._clock(), booking.picked_at)

    def _ended(self, entry: Entry) -> None:
        """All is told that will be. Behind a proxy of ours its log has the last word instead."""
        if self._relays and self._access_log:
            request_log.ended(entry)

    def _refused_or_unknown(self, logged: AccessEntry) -> None:
        if self._access_log:
            refused = self._journal.find(logged.request_id)
            if refused is not None:
                request_log.ended(refused)
            else:
                request_log.ended_in_the_proxy(logged)

    # --- the pieces of a pick

    async def _read(self, path: str, body: bytes | None) -> ParsedRequest:
        """Raises ``BadRequest``, unless whatever comes is routed."""
        try:
            # HTTP/2 may end a request without a body with an empty chunk of one.
            if not body and (path in BODILESS or path.startswith("/v1/models/")):
                return unparsed(None, "a request without a body")
            if body is None:
                raise BadRequest(404, f"No API at {path} without a body.", code="unknown_path")
            if len(body) <= INLINE_BODY:
                return parse(path, body)
            return await asyncio.to_thread(parse, path, body)
        except BadRequest as error:
            if not self._any_path:
                raise
            why = error.message if body is not None else "a request without a body"
            return unparsed(body, why)

    def _decide(
        self,
        request: PickRequest,
        parsed: ParsedRequest,
        serving: list[Worker],
        tokens: npt.NDArray[np.uint32] | None,
        now: float,
    ) -> Pairing:
        pool = self._pool
        extras = block_extras(cache_salt=parsed.cache_salt)
        sizes = [w.block_size for w in serving if w.block_size]
        block_size = min(sizes, default=DEFAULT_BLOCK_SIZE)
        if tokens is None:
            matched: dict[tuple[str, str, int], dict[int, int]] = {}
            size = RequestSize(max(1, parsed.body_bytes // BYTES_PER_TOKEN), block_size)
        else:
            chains = {w.chain(parsed.model) for w in serving}
            matched = overlaps(pool.index, chains, tokens, extras)
            size = RequestSize(len(tokens), block_size)
        if self._circuits is not None:
            self._circuits.apply(now)
        found = candidates(
            pool.workers.values(), parsed.model, matched, pool.index, now, size.blocks
        )
        if request.subset is not None:
            found = within(request.subset, found)
        turn, self._turn = self._turn, self._turn + 1
        scheduler, ask = self._scheduler, None
        by_cost = scheduler is None and self._policy.mode == "kv"
        guess = by_cost and tokens is not None and not all(w.tracked for w in serving)
        if scheduler is not None or guess:
            ask = Ask(
                parsed.model,
                size,
                now,
                pool.workers,
                request.head.headers,
                tokens,
                lambda: prompt_bytes(parsed, request.body or b""),
                extras,
            )

        if guess and ask is not None:
            ask.prefixes = Prefixes(ask, self._approximate)
            found = ask.prefixes.estimated_overlaps(found)

        def rank(among: Sequence[Candidate], peer: Candidate | None) -> Decision:
            if scheduler is None or ask is None:
                exact = tokens is not None
                return choose(size, among, self._policy, self._rng, turn=turn, tokens_exact=exact)
            ask.peer = None if peer is None else pool.workers[peer.name]
            profile = PREFILL if peer is not None and PREFILL in scheduler.profiles else ""
            return scheduler.decide(ask, among, self._rng, turn=turn, profile=profile)

        pairing = pair(
            found,
            rank,
            self._disagg,
            self._rng,
            splittable=parsed.splittable,
            can_sign=self._secret is not None,
        )
        if ask is not None and pairing.split is not Split.REFUSED:
            decisions = [pairing.decode]
            if pairing.prefill is not None and pairing.prefillers:
                decisions.append(pairing.prefill)
            for decision in decisions:
                if scheduler is not None:
                    scheduler.picked(ask, decision)
                elif decision.chosen is not None and ask.prefixes is not None:
                    ask.prefixes.sent(decision.chosen.candidate)
        return pairing

    def _why_approximate(self, decision: Decision) -> str:
        vague = [s.candidate.name for s in decision.ranked if not s.candidate.exact]
        problems = {
            f"{name}: {self._pool.workers[name].problem or 'cache not known in full'}"
            for name in vague[:3]
        }
        return "; ".join(sorted(problems))

    def _route(
        self,
        parsed: ParsedRequest,
        named: str,
        changed: bytes | None,
        pairing: Pairing,
        entry: Entry,
        admitted: Admitted | None,
    ) -> Route:
        decision = pairing.decode
        assert decision.chosen is not None
        worker, cached = self._cached(decision.chosen, decision.size)
        prompt = decision.size.prompt_tokens
        key = f"{self._replica}-{self._turn}"
        now = self._clock()
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
        endpoints, rank = decision.endpoints, worker.rank(decision.chosen.candidate.rank)
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
        self._bookings[key] = booking
        if admitted is not None:
            admitted.booked = True
        self._open[entry.request_id] = entry
        metrics = self._metrics.model(parsed.model)
        metrics.started.inc()
        metrics.active.inc()
        rewritten = parsed.model not in ("", named)
        return Route(
            endpoints=endpoints[: decision.limit or 1 + self._fallbacks],
            set_headers=tuple(headers),
            body=changed,
            response_headers=self._scheduler.answer_headers(decision) if self._scheduler else (),
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

    def _changed(self, parsed: ParsedRequest, named: str, body: bytes) -> bytes | None:
        """The body for the engine; None: as it came. Before anything is booked, as it may raise
        ``BadRequest``: the body was read from another stack, and may be too deep for this one."""
        changed = strip_kv_transfer_params(body) if parsed.has_kv_transfer_params else None
        if changed is not None:
            self._metrics.stripped.inc()
        if parsed.model not in ("", named):
            changed = replace_model(body if changed is None else changed, parsed.model)
        return changed

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
            enforce=self._disagg.enforce,
            local_tokens=local,
            cached_tokens=tuple(cached for _, cached in workers),
        )
        worker, cached = workers[0]
        booking = Booking(
            key + PREFILL_BOOKING, kind, worker, entry, now, size.prompt_tokens, half=True
        )
        worker.load.book(booking.key, size.prompt_tokens, cached, now)
        self._bookings[booking.key] = booking
        return booking, grant.headers(self._secret)

    def _count(self, entry: Entry, pairing: Pairing, seconds: float) -> None:
        decision, stage_ms = pairing.decode, self._metrics.stage_ms
        stage_ms["tokenize"].observe(entry.stages_ms["tokenize"])
        stage_ms["total"].observe(seconds * 1e3)
        self._metrics.schedule.observe(entry.stages_ms["choose"] / 1e3)
        metrics = self._metrics.model(entry.model)
        metrics.decision(decision.how, decision.mode).inc()
        if entry.prompt_tokens >= 0:
            metrics.input_tokens.observe(entry.prompt_tokens)
            computes = pairing.prefill if pairing.prefillers else decision
            if computes is not None and computes.chosen is not None and decision.size.blocks:
                overlap = computes.chosen.candidate.overlap_blocks
                metrics.hit_rate.observe(overlap / decision.size.blocks)

    # --- refusals

    def _refuse_unserved(self, model: str) -> Refusal:
        served = sorted(self._pool.models(ready=False))
        if not served:
            return self._refuse(
                503, "No worker has come up yet.", "rejected-no-endpoints", code="no_workers"
            )
        return self._refuse(
            404,
            f"The model {model!r} does not exist. Served: {', '.join(served)}.",
            "unknown-model",
            param="model",
            code="model_not_found",
        )

    def _refuse_unroutable(self, model: str, decision: Decision) -> Refusal:
        """429: there is capacity, but a filter keeps it back; 503: there is none."""
        if decision.filtered:
            return self._refuse(
                429,
                f"All workers for {model} are kept back at the moment; try again later.",
                "rejected-saturated",
                code="workers_saturated",
            )
        message = f"No worker for {model} can take requests at the moment."
        if any(candidate.dropped == OUTSIDE for candidate in decision.dropped):
            message = f"No worker for {model} that the gateway allows can take requests."
        return self._refuse(503, message, "rejected-no-endpoints", code="no_worker_available")

    def _reject(self, rejection: Rejection) -> Refusal:
        return self._refuse(
            rejection.status,
            rejection.message,
            rejection.reason,
            code=rejection.reason.replace("-", "_"),
            retry_after_s=rejection.retry_after_s,
        )

    def _refuse_unsplit(self, model: str, pairing: Pairing) -> Refusal:
        reason = "no prefill worker can take requests at the moment"
        if pairing.why is Why.NO_SECRET:
            reason = "the picker has no secret to name prefill workers with"
        return self._refuse(
            503,
            f"No prefill for {model}: {reason}, and this deployment allows no other way.",
            "rejected-no-prefill-endpoints",
            code="no_prefill_worker_available",
        )

    def _refuse(
        self,
        status: int,
        message: str,
        reason: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> Refusal:
        if retry_after_s is None:
            retry_after_s = {429: CONTENDED_RETRY_S, 503: NO_ENDPOINT_RETRY_S}.get(status)
        retry = () if retry_after_s is None else (("retry-after", str(retry_after_s)),)
        self._metrics.refusals.labels(str(status), reason).inc()
        return Refusal(
            status,
            error_body(status, message, param=param, code=code),
            (("content-type", "application/json"), (REASON_HEADER, reason), *retry),
        )

    # --- for the status server

    def kept_bookings(self) -> int:
        """Requests that run, or whose worker may still tell how they ended."""
        return len(self._bookings)

    def state(self) -> dict[str, Any]:
        """Workers as `/debug/workers` shows them."""
        now = self._clock()
        return {
            "warm": self._pool.warm(),
            "workers": [
                {
                    "name": worker.name,
                    "endpoint": worker.endpoint.hostport,
                    "role": worker.endpoint.role,
                    "state": worker.state(),
                    "problem": worker.problem,
                    "circuit": told(worker, now),
                    "models": sorted(worker.models),
                    "block_size": worker.block_size,
                    "cached_blocks": self._pool.cached_blocks(worker),
                    "active_requests": worker.load.active_requests(),
                    "active_prefill_tokens": worker.load.active_prefill_tokens(now),
                    "active_decode_blocks": worker.load.active_decode_blocks(),
                    "waiting": worker.load.waiting,
                    "kv_blocks_used": worker.load.kv_blocks_used,
                    "kv_blocks_total": worker.load.kv_blocks_total,
                    "pickers": worker.load.pickers,
                }
                for worker in self._pool.workers.values()
            ],
        }
