"""The order of a pick: read, rewrite, pass the gate, tokenize, rank, book, answer.

What each step does is beside this module or in a room of its own; here is only which follows which,
where a request may wait, and what is told when there is nothing to choose.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dynamo_kv_router.choice import Policy, Rng
from dynamo_kv_router.stream.format import Finished, WorkerInfo
from dynamo_runtime.logs import request_id as request_id_of
from dynamo_runtime.tracing import Tracing

from dynamo_epp.admission.gate import NO_ENDPOINTS, Admitted, Arrival, Gate, Rejection
from dynamo_epp.endpoints.circuits import Circuits
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.explain import Disagg, Entry, Journal, Kept, spans
from dynamo_epp.explain.workers import pool_state
from dynamo_epp.extproc import PickRequest, Refusal, Route
from dynamo_epp.metrics import PickerMetrics
from dynamo_epp.models import NO_RULES, ModelRules
from dynamo_epp.picker import refusals
from dynamo_epp.picker.bookings import Bookings
from dynamo_epp.picker.outcomes import Outcomes
from dynamo_epp.picker.ranking import Ranking
from dynamo_epp.picker.reading import (
    Asked,
    PromptTokens,
    expected_tokens,
    for_the_engine,
    read,
    tokens_of,
)
from dynamo_epp.picker.routes import Routes
from dynamo_epp.requests import BadRequest, ParsedRequest, unparsed
from dynamo_epp.scheduling.ask import Tokens
from dynamo_epp.scheduling.disagg import DisaggPolicy, Pairing, Split, Why
from dynamo_epp.scheduling.scheduler import Scheduler
from dynamo_epp.server import AccessEntry

log = logging.getLogger(__name__)


class KvPicker:
    """Chooses among the pool's workers. Implements ``extproc.Picker`` and
    ``endpoints.streams.RequestWatcher``.

    ``scheduler`` ranks by a configuration's profiles; without one ``policy`` does.
    ``gate`` holds requests back that may not go yet; without one all of them go at once.
    ``clock`` gives monotonic seconds, ``wall`` Unix seconds; ``replica`` is unique per picker
    process and starts every booking key. A request that comes before the pool is warm waits at
    most ``warm_up_s`` seconds. ``any_path``: requests that can't be understood, or name a model
    that nobody is known to serve now or later, are routed by load instead of refused.
    ``fallbacks``: endpoints named behind the first one, for the proxy to retry on. ``access_log``
    writes a line for each request. ``relays`` says that answers pass through this process, and that
    no access log of a proxy tells how they ended. ``secret`` signs what decode workers may ask of
    prefill workers.
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
        disagg = disagg or DisaggPolicy()
        self._pool = pool
        self._tokenization = tokenization
        self._metrics = metrics
        self._journal = journal
        self._replica = replica
        self._rng = rng
        self._clock = clock
        self._wall = wall
        self._warm_up_s = warm_up_s
        self._any_path = any_path
        self.rules: ModelRules = NO_RULES
        """What people say of models; replaced whenever that changes."""
        self._tracing = tracing
        self._gate = gate
        self._told_no_secret = False
        self._warmed = False
        self._turn = 0  # decisions so far
        self._bookings = Bookings()
        self._ranking = Ranking(
            pool,
            policy,
            rng,
            circuits=circuits,
            scheduler=scheduler,
            disagg=disagg,
            can_sign=secret is not None,
        )
        self._routes = Routes(
            pool,
            self._bookings,
            circuits=circuits,
            scheduler=scheduler,
            fallbacks=fallbacks,
            enforce=disagg.enforce,
            secret=secret,
            wall=wall,
        )
        self._outcomes = Outcomes(
            pool,
            self._bookings,
            tokenization,
            metrics,
            journal,
            clock=clock,
            wall=wall,
            access_log=access_log,
            relays=relays,
            tracing=tracing,
            gate=gate,
            circuits=circuits,
        )

    # --- the pick

    async def pick(self, request: PickRequest) -> Route | Refusal:
        request_id = request.head.headers.get("x-request-id", "")
        request_id_of.set(request_id)
        asked = Asked(request_id, request.head.path.partition("?")[0], self._clock())
        try:
            answer = await self._pick(request, asked)
        except asyncio.CancelledError:
            self._outcomes.refused(request, asked, refusals.LEFT)
            raise
        if isinstance(answer, Refusal):
            self._metrics.refusals.labels(str(answer.status), refusals.reason_of(answer)).inc()
            self._outcomes.refused(request, asked, answer)
        elif self._tracing is not None and asked.entry is not None and asked.parsed is not None:
            try:
                answer.set_headers += spans.decided(
                    self._tracing, request.head.headers, asked.entry, asked.parsed, self._wall()
                )
            except Exception:  # the pick is booked; without its answer nobody would release it
                log.exception("the span of request %s was not recorded", request_id)
        return answer

    async def _pick(self, request: PickRequest, asked: Asked) -> Route | Refusal:
        """From the bytes to the gate."""
        try:
            parsed = await read(asked.path, request.body, any_path=self._any_path)
        except BadRequest as error:
            return refusals.bad_request(error)
        asked.named = parsed.model
        rule = self.rules.rule(asked.named) if asked.named else None
        if rule is not None:
            parsed = replace(parsed, model=rule.draw(self._rng))
            self._metrics.rewrites.labels(rule.source, parsed.model).inc()
        if self._any_path and not self._pool.serving(parsed.model) and not self._expects(parsed):
            why = f"no worker is known to serve the model {parsed.model!r}"
            parsed = unparsed(request.body, why)
        asked.parsed = parsed
        if not self._warmed and parsed.prompt is not None:
            # Once only: a worker that stays silent makes decisions approximate, not slow.
            await self._pool.wait_warm(self._warm_up_s)
            self._warmed = True
        if self._gate is None or request.subset == ():  # nothing to wait for
            return await self._choose(request, asked, parsed)
        return await self._pass(self._gate, request, asked, parsed)

    async def _pass(
        self, gate: Gate, request: PickRequest, asked: Asked, parsed: ParsedRequest
    ) -> Route | Refusal:
        """Through the gate, which may let it wait."""
        serving = self._pool.serving(parsed.model)
        if not serving and not gate.knows(parsed.model):
            return self._unserved(parsed.model)
        base = serving[0].model if serving and parsed.model else ""
        longest = max((worker.max_model_len for worker in serving), default=0)
        tokens = expected_tokens(parsed, longest)
        headers = request.head.headers
        arrival = Arrival(parsed.model, base, headers, tokens, parsed.body_bytes)
        arrived = self._clock()
        try:
            admitted = await gate.enter(arrival)
        finally:
            asked.waited_s = self._clock() - arrived
        asked.tenant = admitted.tenant
        if isinstance(admitted, Rejection):
            if admitted.reason == NO_ENDPOINTS and self._pool.serving(parsed.model):
                # The choice fails, too, and so keeps what is wrong with each of them.
                return await self._choose(request, asked, parsed)
            return refusals.rejected(admitted)
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
            return self._unserved(parsed.model)
        try:
            changed = for_the_engine(parsed, asked.named, request.body or b"")
        except BadRequest as error:
            return refusals.bad_request(error)
        if changed is not None and parsed.has_kv_transfer_params:
            self._metrics.stripped.inc()
        parsed_at = self._clock()

        tokens: Tokens | None = None
        prompt_tokens, reason = -1, self._ranking.ignores_tokens
        if not reason:
            tokens, prompt_tokens, reason = await tokens_of(self._tokenization, parsed, workers)
        tokenized_at = self._clock()

        turn, self._turn = self._turn, self._turn + 1
        key = f"{self._replica}-{self._turn}"
        pairing = self._ranking.pair(request, parsed, workers, tokens, tokenized_at, turn)
        decision = pairing.decode
        if not reason and decision.how != "exact":
            reason = self._ranking.why_approximate(decision)
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
        self._tell_split(parsed.model, pairing)
        if decision.chosen is None:
            return refusals.unroutable(parsed.model, decision)
        if pairing.split is Split.REFUSED:
            return refusals.unsplit(parsed.model, pairing)
        route = self._routes.book(
            key, parsed, asked.named, changed, pairing, entry, admitted, self._clock()
        )
        self._outcomes.routed(entry)
        done = self._clock()
        entry.stages_ms["choose"] = (done - tokenized_at) * 1e3
        self._count(entry, pairing, done - started)
        return route

    def _expects(self, parsed: ParsedRequest) -> bool:
        """Whether somebody said that the model is served, though nobody serves it at the moment."""
        return self._gate is not None and self._gate.expects(parsed.model)

    def _unserved(self, model: str) -> Refusal:
        pool = self._pool
        return refusals.unserved(model, pool.models(ready=False), pool.undescribed())

    def _tell_split(self, model: str, pairing: Pairing) -> None:
        if pairing.why is Why.NO_SECRET and not self._told_no_secret:
            self._told_no_secret = True
            log.error(
                "no DYN_PD_SECRET or DYN_PD_SECRET_FILE: prefill workers can't be named, decode "
                "workers do both phases or, with --enforce-disagg, nobody does"
            )
        if pairing.split is not None and pairing.decode.chosen is not None:
            label = self._metrics.label(model)
            self._metrics.disagg.labels(label, pairing.split, pairing.why or "").inc()

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

    # --- what comes after: extproc.Picker, endpoints.streams.RequestWatcher, the access log

    def answered(self, route: Route) -> None:
        self._outcomes.answered(route)

    def released(self, route: Route) -> None:
        self._outcomes.released(route)

    def on_accepted(self, worker: Worker, key: str, blind_window_s: float | None) -> None:
        self._outcomes.accepted(worker, key, blind_window_s)

    def on_first_token(self, worker: Worker, key: str) -> None:
        self._outcomes.first_token(worker, key)

    def on_prefillers_failed(self, worker: Worker, key: str, addresses: tuple[str, ...]) -> None:
        self._outcomes.prefillers_failed(key, addresses)

    def on_finished(self, worker: Worker, event: Finished) -> None:
        self._outcomes.finished(worker, event)

    def on_described(self, worker: Worker, info: WorkerInfo) -> None:
        self._tokenization.on_described(worker, info)

    def on_lost(self, worker: Worker, reason: str) -> None:
        self._outcomes.lost(worker, reason)

    def on_resynced(self, worker: Worker) -> None:
        self._outcomes.unseen(worker)

    def on_access_log(self, logged: AccessEntry) -> None:
        self._outcomes.logged(logged)

    # --- for the status server

    def kept_bookings(self) -> int:
        """Requests that run, or whose worker may still tell how they ended."""
        return len(self._bookings)

    def state(self) -> dict[str, Any]:
        """Workers as `/debug/workers` shows them."""
        return pool_state(self._pool, self._clock())
