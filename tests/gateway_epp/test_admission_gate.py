"""The gate, in virtual time: who goes, who waits how long, who is told what."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from dynamo_epp.admission.gate import Admitted, Arrival, Gate, Rejection
from dynamo_epp.admission.metrics import AdmissionMetrics
from dynamo_epp.admission.settings import (
    FlowControlSettings,
    IdentitySettings,
    PriorityBand,
    RateLimit,
    RateLimits,
)
from prometheus_client import CollectorRegistry

from tests.gateway_epp.simulated_pool import MODEL, SimulatedPool, tell
from tests.virtual_time import in_virtual_time

IDENTITY = IdentitySettings(tenant_header="x-tenant", priority_header="x-priority")
HELD = FlowControlSettings(identity=IDENTITY)
QUEUED = FlowControlSettings(enabled=True, identity=IDENTITY)


@dataclass
class World:
    gate: Gate
    pool: SimulatedPool
    registry: CollectorRegistry

    async def ask(self, tenant: str = "a", priority: int = 0, **more: Any) -> Admitted | Rejection:
        return await self.gate.enter(arrival(tenant, priority, **more))

    def start(self, tenant: str = "a", priority: int = 0, **more: Any) -> Asked:
        return asyncio.create_task(self.ask(tenant, priority, **more))

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"dynamo_epp_flow_control_{name}", labels) or 0.0


Asked = asyncio.Task[Admitted | Rejection]


def arrival(
    tenant: str = "a", priority: int = 0, *, model: str = MODEL, tokens: float = 100, size: int = 1
) -> Arrival:
    headers = {"x-tenant": tenant, "x-priority": str(priority)}
    return Arrival(model, MODEL if model == MODEL else "", headers, tokens, size)


@asynccontextmanager
async def world(settings: FlowControlSettings, workers: int = 2) -> AsyncIterator[World]:
    registry = CollectorRegistry()
    async with SimulatedPool(workers) as pool:
        clock = asyncio.get_running_loop().time
        gate = Gate(settings, pool, AdmissionMetrics(registry), clock=clock)
        gate.learn()
        try:
            yield World(gate, pool, registry)
        finally:
            gate.stop()


def virtual(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        in_virtual_time(test)

    run.__name__ = test.__name__
    return run


def away(w: World) -> None:
    w.pool.away = {engine.worker.name for engine in w.pool.engines}


def freeze(w: World) -> None:
    """The engines stay full and say so, whatever they are given."""
    for engine in w.pool.engines:
        engine.queue.extend(asyncio.get_running_loop().create_future() for _ in range(5))
        engine.running = engine.slots
        tell(engine.worker.load, engine.slots, 5, asyncio.get_running_loop().time())


def thaw(w: World) -> None:
    for engine in w.pool.engines:
        engine.queue.clear()
        engine.running = 0


# --- held: no endpoint


@virtual
async def test_a_request_for_a_model_without_endpoint_is_held_until_there_is_one() -> None:
    async with world(HELD) as w:
        away(w)
        asked = w.start()
        await asyncio.sleep(30)
        assert not asked.done()
        w.gate.show_lanes()
        assert w.metric("demand_requests", model=MODEL) == 1
        w.pool.away = set()
        admitted = await asked
        assert isinstance(admitted, Admitted)
        assert admitted.waited_s == pytest.approx(30, abs=0.1)
        w.gate.show_lanes()
        assert w.metric("demand_requests", model=MODEL) == 0


@virtual
async def test_held_too_long_is_503_and_goes_on_counting_as_demand() -> None:
    async with world(HELD) as w:
        away(w)
        refused = await w.ask()
        assert isinstance(refused, Rejection)
        assert (refused.status, refused.reason) == (503, "rejected-no-endpoints")
        assert refused.retry_after_s >= 1
        assert asyncio.get_running_loop().time() == pytest.approx(60, abs=0.2)
        await asyncio.sleep(HELD.demand_s - 5)
        w.gate.show_lanes()
        assert w.metric("demand_requests", model=MODEL) == 1
        await asyncio.sleep(10)
        w.gate.show_lanes()
        assert w.metric("demand_requests", model=MODEL) == 0


@virtual
async def test_a_client_that_leaves_frees_its_place_and_was_demand() -> None:
    async with world(replace(HELD, max_requests=1)) as w:
        away(w)
        first = w.start()
        await asyncio.sleep(1)
        full = await w.ask()
        assert isinstance(full, Rejection)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = w.start()
        await asyncio.sleep(1)
        assert not second.done()
        w.gate.show_lanes()
        assert w.metric("demand_requests", model=MODEL) == 2  # one held, one who left
        outcome = {"fairness_id": "a", "priority": "0", "outcome": "rejected-context-cancelled"}
        assert w.metric("requests_total", **outcome) == 1


@virtual
async def test_a_picker_that_ends_holds_nobody() -> None:
    async with world(HELD) as w:
        away(w)
        held = w.start()
        await asyncio.sleep(1)
        w.gate.drain()
        for refused in (await held, await w.ask()):
            assert isinstance(refused, Rejection)
            assert (refused.status, refused.reason) == (503, "rejected-shutting-down")
        w.pool.away = set()
        assert isinstance(await w.ask(), Admitted)  # what runs can still be served


@virtual
async def test_what_was_served_once_or_is_listed_is_known_and_nothing_else() -> None:
    async with world(replace(HELD, models=("listed",))) as w:
        assert w.gate.knows(MODEL)
        away(w)
        assert w.gate.knows(MODEL)
        assert w.gate.knows("listed")
        assert not w.gate.knows("other")
        w.gate.named = {"canary"}
        assert w.gate.knows("canary")
        assert not w.gate.knows("other")


@virtual
async def test_an_adapter_that_its_workers_dropped_is_not_waited_for() -> None:
    async with world(HELD) as w:
        for engine in w.pool.engines:
            engine.worker.models = frozenset([MODEL, "adapter"])
        w.gate.learn()
        for engine in w.pool.engines:
            engine.worker.models = frozenset([MODEL])
        assert not w.gate.knows("adapter")
        away(w)
        assert w.gate.knows("adapter")  # it may come back with them


@virtual
async def test_before_anything_is_known_every_model_may_come() -> None:
    async with world(HELD, workers=0) as w:
        assert w.gate.knows("any")
        w.gate.named = {"canary"}  # says nothing of those that are not rewritten
        assert w.gate.knows("any")
        assert not w.gate.expects("any")


# --- queued: no room


@virtual
async def test_without_flow_control_full_engines_queue_themselves() -> None:
    async with world(HELD) as w:
        freeze(w)
        assert isinstance(await w.ask(), Admitted)


@virtual
async def test_a_request_waits_for_room_and_no_longer_than_its_time() -> None:
    async with world(replace(QUEUED, default_request_ttl=20)) as w:
        freeze(w)
        early = w.start()
        await asyncio.sleep(10)
        late = w.start()
        refused = await early
        assert isinstance(refused, Rejection)
        assert (refused.status, refused.reason) == (429, "rejected-ttl-expired")
        assert asyncio.get_running_loop().time() == pytest.approx(20, abs=0.2)
        thaw(w)
        assert isinstance(await late, Admitted)


@virtual
async def test_the_time_for_room_begins_when_there_is_an_endpoint() -> None:
    async with world(replace(QUEUED, default_request_ttl=10, no_endpoint_request_ttl=100)) as w:
        away(w)
        asked = w.start()
        await asyncio.sleep(50)
        freeze(w)
        w.pool.away = set()
        await asyncio.sleep(9)
        assert not asked.done()
        refused = await asked
        assert isinstance(refused, Rejection)
        assert refused.reason == "rejected-ttl-expired"
        assert asyncio.get_running_loop().time() == pytest.approx(60, abs=0.5)


@virtual
async def test_what_may_be_shed_is_refused_at_once_when_the_engines_are_full() -> None:
    for settings in (HELD, QUEUED):
        async with world(settings) as w:
            assert isinstance(await w.ask(priority=-1), Admitted)
            freeze(w)
            refused = await w.ask(priority=-1)
            assert isinstance(refused, Rejection)
            assert (refused.status, refused.reason) == (429, "rejected-saturated")


@virtual
async def test_or_it_waits_and_gives_its_place_to_others() -> None:
    async with world(replace(QUEUED, shed_when_saturated=False, max_requests=1)) as w:
        freeze(w)
        batch = w.start(priority=-1)
        await asyncio.sleep(1)
        urgent = w.start()
        evicted = await batch
        assert isinstance(evicted, Rejection)
        assert (evicted.status, evicted.reason) == (429, "evicted-queue-pressure")
        assert evicted.retry_after_s >= 1
        thaw(w)
        assert isinstance(await urgent, Admitted)


@virtual
async def test_a_full_band_refuses() -> None:
    settings = replace(QUEUED, default_priority_band=PriorityBand(max_requests=2))
    async with world(settings) as w:
        freeze(w)
        waiting = [w.start() for _ in range(2)]
        await asyncio.sleep(1)
        assert w.metric("queue_size", priority="0") == 2
        assert w.metric("queue_bytes", priority="0") == 2
        refused = await w.ask()
        assert isinstance(refused, Rejection)
        assert (refused.status, refused.reason) == (429, "rejected-saturated")
        w.gate.stop()
        for stopped in await asyncio.gather(*waiting):
            assert isinstance(stopped, Rejection)
            assert stopped.reason == "rejected-shutting-down"


@virtual
async def test_a_place_is_free_the_moment_its_client_leaves() -> None:
    settings = replace(QUEUED, default_priority_band=PriorityBand(max_requests=1))
    async with world(settings) as w:
        freeze(w)
        for _ in range(20):
            asked = w.start()
            await asyncio.sleep(0)
            assert w.gate.waiting() == 1
            asked.cancel()
            await asyncio.wait([asked])
            assert w.gate.waiting() == 0


@virtual
async def test_a_client_that_leaves_in_the_moment_it_is_let_go_takes_no_room() -> None:
    async with world(QUEUED, workers=1) as w:
        load = w.pool.engines[0].worker.load
        for delay in range(6):
            freeze(w)
            asked = w.start()
            await asyncio.sleep(0.2)
            thaw(w)
            tell(load, 0, 0, asyncio.get_running_loop().time())
            w.gate.kick()
            for _ in range(delay):
                await asyncio.sleep(0)
            asked.cancel()
            await asyncio.wait([asked])
            if not asked.cancelled():
                admitted = asked.result()
                assert isinstance(admitted, Admitted)
                with admitted:
                    pass
            assert w.gate.on_way(MODEL) == 0


# --- limits


@virtual
async def test_a_tenant_has_its_rate_and_each_picker_its_share_of_it() -> None:
    limits = RateLimits(default=RateLimit(requests_per_s=4, burst_s=1))
    for pickers, passed in ((1, 44), (2, 22)):
        async with world(replace(HELD, limits=limits)) as w:
            w.pool.live_pickers = pickers
            outcomes: Counter[str] = Counter()
            for _ in range(100):
                answer = await w.ask("busy")
                outcomes["passed" if isinstance(answer, Admitted) else answer.reason] += 1
                if isinstance(answer, Rejection):
                    assert answer.status == 429
                    assert answer.retry_after_s == 1
                await asyncio.sleep(0.1)
            assert outcomes == {
                "passed": pytest.approx(passed, abs=2),
                "rejected-rate-limited": pytest.approx(100 - passed, abs=2),
            }
            assert isinstance(await w.ask("other"), Admitted)


@virtual
async def test_tokens_are_charged_as_expected_and_corrected_as_used() -> None:
    limits = RateLimits(default=RateLimit(tokens_per_s=100, burst_s=10))
    async with world(replace(HELD, limits=limits)) as w:
        admitted = await w.ask(tokens=2000)  # more than the bucket holds: it goes into debt
        assert isinstance(admitted, Admitted)
        with admitted:
            admitted.booked = True
        refused = await w.ask(tokens=1)
        assert isinstance(refused, Rejection)
        assert refused.retry_after_s == 10
        w.gate.used(admitted, 500)  # it ended early
        w.gate.used(admitted, 0)  # said twice, counted once
        for _ in range(5):
            again = await w.ask(tokens=100)
            assert isinstance(again, Admitted)
            with again:
                again.booked = True
        assert isinstance(await w.ask(tokens=1), Rejection)


@virtual
async def test_what_was_refused_after_all_costs_nothing() -> None:
    limits = RateLimits(default=RateLimit(requests_per_s=0.001, burst_s=1))
    async with world(replace(HELD, limits=limits)) as w:
        away(w)
        for _ in range(3):
            refused = await w.ask()
            assert isinstance(refused, Rejection)
            assert refused.reason == "rejected-no-endpoints"


# --- overload


@dataclass
class Load:
    tenant: str
    priority: int
    per_s: float
    cost: float  # tokens; 100 take a second


@virtual
async def test_at_three_times_the_capacity() -> None:
    """32 requests of 100 tokens a second can be served; 96 come."""
    loads = [
        Load("vip", 10, 5, 100),
        Load("flood", 0, 70, 100),
        Load("modest", 0, 10, 100),
        Load("long", 0, 5, 200),
        Load("batch", -1, 6, 100),
    ]
    settings = replace(
        QUEUED,
        default_request_ttl=10,
        default_priority_band=PriorityBand(max_requests=200),
    )
    seconds, warm = 120.0, 20.0
    rng = random.Random(1)
    waits: dict[str, list[float]] = defaultdict(list)
    tokens: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    rejections: dict[str, list[Rejection]] = defaultdict(list)

    async with world(settings, workers=4) as w:
        loop = asyncio.get_running_loop()

        async def one(load: Load) -> None:
            began = loop.time()
            answer = await w.ask(load.tenant, load.priority, tokens=load.cost)
            if isinstance(answer, Rejection):
                rejections[load.tenant].append(answer)
                return
            with answer:
                engine, key = w.pool.book(load.cost)
                answer.booked = True
            await asyncio.sleep(0.002)  # the blind window
            await engine.serve(key, load.cost / 100, load.cost)
            w.gate.kick()
            waits[load.tenant].append(loop.time() - began - load.cost / 100)
            if warm <= loop.time() < seconds:
                tokens[load.tenant] += int(load.cost)

        async def arrive(load: Load) -> None:
            async with asyncio.TaskGroup() as requests:
                while loop.time() < seconds:
                    asked[load.tenant] += 1
                    requests.create_task(one(load))
                    await asyncio.sleep(rng.expovariate(load.per_s))

        async with asyncio.TaskGroup() as group:
            for load in loads:
                group.create_task(arrive(load))

    for tenant in asked:  # everybody got exactly one answer
        assert asked[tenant] == len(waits[tenant]) + len(rejections[tenant])

    capacity = 4 * 8 * 100 * (seconds - warm)
    assert tokens.total() >= 0.97 * capacity

    assert not rejections["vip"]
    # It waits behind what the engines queue themselves, some 5 requests over 8 slots, at most 2 s
    # each; behind nothing else.
    assert sorted(waits["vip"])[int(0.99 * len(waits["vip"]))] < 2.0
    assert tokens["vip"] == pytest.approx(5 * 100 * (seconds - warm), rel=0.15)

    share = (tokens.total() - tokens["vip"]) / 3
    for tenant in ("flood", "modest", "long"):
        assert tokens[tenant] == pytest.approx(share, rel=0.12), tokens

    assert len(rejections["batch"]) > 0.95 * asked["batch"]
    reasons = Counter(r.reason for each in rejections.values() for r in each)
    assert set(reasons) <= {"rejected-saturated", "rejected-ttl-expired", "evicted-queue-pressure"}
    for each in rejections.values():
        assert all(r.status == 429 and 1 <= r.retry_after_s <= 30 for r in each)
