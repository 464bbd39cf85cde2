"""The gate: each request asks it before the choice, and goes, waits or is refused.

All that decides is pure and elsewhere. Here are the waiters' futures, the moments at which the
queue is looked at (a request ends, a tick passes), and the answers in HTTP's terms. 429 means that
there is capacity and others use it; 503 that there is none.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol

from dynamo_epp.admission.demand import GivenUp
from dynamo_epp.admission.identity import (
    DEFAULT_TENANT,
    Objectives,
    no_objectives,
    priority_of,
    tenant_of,
)
from dynamo_epp.admission.limits import Charge, RateLimiter
from dynamo_epp.admission.metrics import OTHER, AdmissionMetrics
from dynamo_epp.admission.pace import Pace
from dynamo_epp.admission.queue import FlowQueue, Item
from dynamo_epp.admission.saturation import has_room, occupancy, pool_saturation
from dynamo_epp.admission.settings import FlowControlSettings
from dynamo_epp.endpoints.worker import Worker

log = logging.getLogger(__name__)

TICK_S = 0.05
"""While somebody waits, the queue is looked at this often even if nothing was heard."""
NO_ENDPOINT_RETRY_S = 10
"""`Retry-After` while a model has no endpoint: when one will come is not known here."""
NO_ENDPOINTS = "rejected-no-endpoints"
MAX_MODELS = 1000
MAX_NAME = 256
"""Characters of the name of a model that nobody has told."""


class Endpoints(Protocol):
    """What the gate needs of a pool."""

    def eligible(self, model: str) -> Iterator[Worker]:
        """Workers that may get a request for ``model`` at this moment."""
        ...

    def models(self) -> Mapping[str, str]:
        """Each name that is served, by ready workers or others -> its base model."""
        ...

    def pickers(self) -> int:
        """Live pickers, this one included."""
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request at the gate."""

    model: str
    base: str  # the base model of those that serve it; "" if nobody does
    headers: Mapping[str, str]  # lower-case names
    tokens: float  # expected, prompt and answer
    size: int  # bytes of its body


@dataclass(frozen=True, slots=True)
class Rejection:
    """``reason`` is llm-d's word for `x-llm-d-request-dropped-reason`, or one in its manner."""

    status: int
    reason: str
    message: str
    retry_after_s: int  # ≥ 1
    tenant: str = ""  # of the request; "" if nobody said who it is


class Admitted:
    """A request that may go now. Use as a context until it is ``booked`` on a worker: so long it
    counts as on its way to one. If it never is, its ``charge`` is given back. ``tenant`` is "" if
    nobody said who it is."""

    __slots__ = ("_leave", "booked", "charge", "priority", "tenant", "waited_s")

    def __init__(
        self,
        tenant: str,
        priority: int,
        waited_s: float,
        charge: Charge,
        leave: Callable[[Admitted], None],
    ) -> None:
        self.tenant = tenant
        self.priority = priority
        self.waited_s = waited_s
        self.charge = charge
        self.booked = False
        self._leave = leave

    def __enter__(self) -> Admitted:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave(self)


@dataclass(slots=True, eq=False)
class _Lane:
    """What is known of one model's endpoints."""

    given_up: GivenUp
    pace: Pace = field(default_factory=Pace)
    served: bool = False  # it has endpoints
    since: float = -math.inf  # of ``served``, seconds
    on_way: int = 0  # let go and not booked yet
    endpoints: int = 0  # as counted lately
    counted_at: float = -math.inf


class Gate:
    """Lets requests through, one picker's. ``clock`` gives monotonic seconds."""

    def __init__(
        self,
        settings: FlowControlSettings,
        endpoints: Endpoints,
        metrics: AdmissionMetrics,
        *,
        clock: Callable[[], float],
        objectives: Objectives = no_objectives,
    ) -> None:
        self.objectives = objectives
        self.named: Collection[str] = ()
        """Models that people send requests to by rewrites; replaced whenever that changes."""
        self._settings = settings
        self._endpoints = endpoints
        self._metrics = metrics
        self._clock = clock
        self._queue = FlowQueue(settings)
        self._limiter = RateLimiter(settings.limits)
        self._lanes: dict[str, _Lane] = {}
        self._waiters: dict[Item, asyncio.Future[Rejection | None]] = {}  # those in the queue
        self._bases: dict[str, str] = {}  # every name ever served -> its base model
        self._shown: set[int] = set()  # priorities whose queue gauges are set
        self._wake: asyncio.Handle | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._draining = False
        self._stopped = False

    # --- what requests ask

    def knows(self, model: str) -> bool:
        """Whether ``model`` may have an endpoint sooner or later."""
        if not model or self.expects(model):  # one that can't be read goes to any
            return True
        told = self._bases or self._settings.models
        return not told and len(model) <= MAX_NAME  # nobody has told yet what there is

    def expects(self, model: str) -> bool:
        """Whether somebody said that ``model`` is served, if not at this moment: a worker, those
        who set up the gate, a rewrite."""
        self.learn()
        if model in self._settings.models or model in self.named:
            return True
        # A name that its base model's workers do not have any more is gone.
        served = self._endpoints.models()
        return model in served or (
            model in self._bases and self._bases[model] not in served.values()
        )

    def learn(self) -> None:
        """Remember what is served, for the time when it is not."""
        for name, base in self._endpoints.models().items():
            if name in self._bases or len(self._bases) < MAX_MODELS:
                self._bases[name] = base

    async def enter(self, arrival: Arrival) -> Admitted | Rejection:
        """Wait until the request may go. Cancelling gives its place to the next at once."""
        identity, now = self._settings.identity, self._clock()
        tenant = tenant_of(arrival.headers, identity)
        told = "" if tenant == DEFAULT_TENANT else tenant
        priority = priority_of(arrival.headers, identity, self.objectives)
        pickers = 1 if self._limiter.idle else self._endpoints.pickers()
        charge = self._limiter.take(tenant, arrival.tokens, pickers, now)
        if isinstance(charge, float):
            refused = _rate_limited(tenant, charge)
            self._count(tenant, priority, refused.reason)
            return replace(refused, tenant=told)
        lane = arrival.base or self._bases.get(arrival.model, arrival.model)
        item = Item(lane, tenant, priority, max(1.0, arrival.tokens), arrival.size, now)
        try:
            rejection = await self._pass(item)
        except asyncio.CancelledError:
            self._limiter.refund(charge)
            self._count(tenant, priority, "rejected-context-cancelled")
            raise
        self._count(tenant, priority, rejection.reason if rejection else "dispatched")
        if rejection:
            self._limiter.refund(charge)
            return replace(rejection, tenant=told)
        state = self._lanes[lane]

        def leave(admitted: Admitted) -> None:
            state.on_way -= 1
            if not admitted.booked:
                self._limiter.refund(charge)
            self.kick()

        waited_s = self._clock() - now
        return Admitted(told, priority, waited_s, charge, leave)

    def used(self, admitted: Admitted, tokens: int) -> None:
        """The worker told what the request really took."""
        self._limiter.settle(admitted.charge, tokens)

    def kick(self) -> None:
        """Something changed: perhaps somebody may go."""
        if self._wake is None and self._queue.requests:
            self._wake = asyncio.get_running_loop().call_soon(self._look)

    # --- the end

    def drain(self) -> None:
        """No endpoint is waited for any more: another picker may have one sooner."""
        self._draining = True
        for item in list(self._waiters):
            if not self._lanes[item.lane].served:
                self._dismiss(item, _SHUTTING_DOWN)

    def stop(self) -> None:
        """Everybody who waits is refused."""
        self._stopped = True
        for item in list(self._waiters):
            self._dismiss(item, _SHUTTING_DOWN)
        for handle in (self._wake, self._tick):
            if handle is not None:
                handle.cancel()
        self._wake = self._tick = None

    # --- how a request passes

    async def _pass(self, item: Item) -> Rejection | None:
        """``None`` once it may go; it then counts as on its way."""
        if self._stopped:
            return _SHUTTING_DOWN
        lane = self._lane(item.lane, item.arrived)
        if lane.served:
            sheddable = item.priority < 0 and self._settings.shed_when_saturated
            judged = self._settings.enabled or sheddable
            full = judged and self._full(item.lane, lane, item.arrived)
            if full and sheddable:
                return self._saturated(item, "Requests of this priority are not taken under load.")
            if not self._queue.waiting(item.lane) and not (full and self._settings.enabled):
                self._let_go(lane, item.arrived)
                return None
        elif self._draining:
            return _SHUTTING_DOWN
        elif not self._settings.no_endpoint_request_ttl:
            return self._no_endpoints(item)
        return await self._wait(item, lane)

    async def _wait(self, item: Item, lane: _Lane) -> Rejection | None:
        offer = self._queue.offer(item)
        for victim in offer.evicted:
            self._verdict(victim, self._evicted(victim))
        if not offer.accepted:
            if not lane.served:
                return self._no_endpoints(item)
            return self._saturated(item, "Too many requests wait already.")
        verdict: asyncio.Future[Rejection | None] = asyncio.get_running_loop().create_future()
        self._waiters[item] = verdict
        if not lane.served and self._queue.waiting(item.lane) == 1:
            limit_s = self._settings.no_endpoint_request_ttl
            log.warning("no endpoint for %s: requests wait up to %g s", item.lane, limit_s)
        self._show()
        self.kick()
        outcome = "rejected-context-cancelled"
        try:
            rejection = await verdict
            outcome = rejection.reason if rejection else "dispatched"
            return rejection
        except asyncio.CancelledError:
            if item in self._waiters:
                self._queue.remove(item)
                self._leave(item, dispatched=False)
                self._show()
            elif not verdict.cancelled() and verdict.result() is None:
                self._lanes[item.lane].on_way -= 1  # let go in the same moment
                self.kick()
            raise
        finally:
            priority = self._metrics.priority(str(item.priority))
            waited = self._clock() - item.arrived
            self._metrics.queue_seconds.labels(priority, outcome).observe(waited)

    def _let_go(self, lane: _Lane, now: float) -> None:
        lane.on_way += 1
        lane.pace.served(now)

    # --- looking at the queue

    def _look(self) -> None:
        """Refuse whose time is over, and let go who may."""
        for handle in (self._wake, self._tick):
            if handle is not None:
                handle.cancel()
        self._wake = self._tick = None
        now = self._clock()
        for name in self._queue.lanes():
            lane = self._lane(name, now)
            self._expire(name, lane, now)
            while lane.served and not (self._settings.enabled and self._full(name, lane, now)):
                item = self._queue.pop(name)
                if item is None:
                    break
                self._let_go(lane, now)
                self._verdict(item, None)
        self._show()
        if self._queue.requests:
            self._tick = asyncio.get_running_loop().call_later(TICK_S, self._look)

    def _lane(self, name: str, now: float) -> _Lane:
        lane = self._lanes.get(name)
        if lane is None:
            if len(self._lanes) >= MAX_MODELS:
                self._drop_idle_lanes()
            lane = self._lanes[name] = _Lane(GivenUp(self._settings.demand_s), since=now)
        served = any(True for _ in self._endpoints.eligible(name))
        if served != lane.served:
            lane.served, lane.since = served, now
            if waiting := self._queue.waiting(name):
                change = "there is an" if served else "there is no"
                log.info("%s endpoint for %s now; %d requests wait", change, name, waiting)
        if served:
            lane.given_up.satisfied()
        return lane

    def _drop_idle_lanes(self) -> None:
        waiting = set(self._queue.lanes())
        for name, lane in list(self._lanes.items()):
            if name not in waiting and not lane.on_way:
                del self._lanes[name]

    def _saturation(self, name: str, lane: _Lane, now: float) -> float:
        endpoints = [occupancy(worker.load, now) for worker in self._endpoints.eligible(name)]
        return pool_saturation(endpoints, self._settings.saturation, lane.on_way)

    def _full(self, name: str, lane: _Lane, now: float) -> bool:
        if now - lane.counted_at >= TICK_S:
            lane.endpoints, lane.counted_at = sum(1 for _ in self._endpoints.eligible(name)), now
        share = lane.on_way / max(1, lane.endpoints)
        endpoints = (occupancy(worker.load, now) for worker in self._endpoints.eligible(name))
        return not has_room(endpoints, self._settings.saturation, share)

    def _expire(self, name: str, lane: _Lane, now: float) -> None:
        """Times run from the arrival, and anew when the lane gets its first endpoint or loses its
        last; nobody waits longer than both times together."""
        settings = self._settings
        ttl = settings.default_request_ttl if lane.served else settings.no_endpoint_request_ttl
        if not ttl:
            return
        before = now - ttl
        if before < lane.since:
            if not settings.default_request_ttl:
                return
            before = now - settings.default_request_ttl - settings.no_endpoint_request_ttl
        for item in self._queue.expire(name, before):
            if lane.served:
                message = f"No engine had room for the request within {now - item.arrived:.0f} s."
                rejection = self._saturated(item, message, reason="rejected-ttl-expired")
            else:
                rejection = self._no_endpoints(item)
            self._verdict(item, rejection)

    def _dismiss(self, item: Item, rejection: Rejection) -> None:
        self._queue.remove(item)
        self._verdict(item, rejection)

    def _verdict(self, item: Item, rejection: Rejection | None) -> None:
        """Tell the waiter of ``item``, which is not in the queue any more."""
        verdict = self._leave(item, dispatched=rejection is None)
        if not verdict.done():
            verdict.set_result(rejection)
        elif rejection is None:  # its client has left in this moment
            self._lanes[item.lane].on_way -= 1

    def _leave(self, item: Item, *, dispatched: bool) -> asyncio.Future[Rejection | None]:
        lane = self._lanes[item.lane]
        if not dispatched and not lane.served:
            lane.given_up.add(self._clock())
        return self._waiters.pop(item)

    # --- what is said

    def _saturated(self, item: Item, message: str, reason: str = "rejected-saturated") -> Rejection:
        return Rejection(429, reason, message, self._retry_after(item))

    def _no_endpoints(self, item: Item) -> Rejection:
        message = f"No worker for {item.lane} can take requests at the moment."
        return Rejection(503, NO_ENDPOINTS, message, NO_ENDPOINT_RETRY_S)

    def _evicted(self, item: Item) -> Rejection:
        message = "The request gave its place in the queue to one that goes before it."
        return Rejection(429, "evicted-queue-pressure", message, self._retry_after(item))

    def _retry_after(self, item: Item) -> int:
        ahead = self._queue.ahead_of(item.lane, item.priority)
        return self._lanes[item.lane].pace.retry_after(ahead, self._clock())

    def _count(self, tenant: str, priority: int, outcome: str) -> None:
        metrics = self._metrics
        metrics.requests.labels(
            metrics.tenant(tenant), metrics.priority(str(priority)), outcome
        ).inc()

    def _show(self) -> None:
        """The queue's gauges, which are looked at whenever it changed."""
        sizes = self._queue.sizes()
        totals: dict[str, tuple[int, int]] = {}
        for priority in self._shown | sizes.keys():
            requests, size = sizes.get(priority, (0, 0))
            label = self._metrics.priority(str(priority))
            others = totals.get(label, (0, 0))
            totals[label] = others[0] + requests, others[1] + size
        self._shown = set(sizes)
        for label, (requests, size) in totals.items():
            self._metrics.queue_size.labels(label).set(requests)
            self._metrics.queue_bytes.labels(label).set(size)

    def show_lanes(self) -> None:
        """The gauges of models; call it now and then."""
        now = self._clock()
        unknown = 0
        for name in list(self._lanes):
            lane = self._lane(name, now)
            demand = lane.given_up.count(now)
            if not lane.served:
                demand += self._queue.waiting(name)
            if not (name in self._bases or name in self._settings.models or name in self.named):
                unknown += demand
                continue
            self._metrics.demand.labels(name).set(demand)
            self._metrics.saturation.labels(name).set(self._saturation(name, lane, now))
        self._metrics.demand.labels(OTHER).set(unknown)

    def on_way(self, model: str) -> int:
        """Requests let go to ``model`` and not booked yet."""
        lane = self._lanes.get(model)
        return lane.on_way if lane else 0

    def waiting(self) -> int:
        """Requests that wait."""
        return self._queue.requests


_SHUTTING_DOWN = Rejection(
    503, "rejected-shutting-down", "This endpoint picker is about to end; try again.", 1
)


def _rate_limited(tenant: str, wait_s: float) -> Rejection:
    return Rejection(
        429,
        "rejected-rate-limited",
        f"The rate limit of {tenant} is used up.",
        max(1, math.ceil(wait_s)),
    )
