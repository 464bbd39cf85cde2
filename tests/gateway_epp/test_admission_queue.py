"""The queue against a simple model: bounds hold, nobody is lost, order and shares are kept."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from dynamo_epp.admission.queue import FlowQueue, Item
from dynamo_epp.admission.settings import FlowControlSettings, PriorityBand
from hypothesis import given, settings
from hypothesis import strategies as st

LANES = ("m", "n")
TENANTS = ("a", "b", "c")
PRIORITIES = (-1, 0, 7)


def item(
    tenant: str = "a",
    priority: int = 0,
    *,
    cost: float = 1.0,
    size: int = 1,
    arrived: float = 0.0,
    lane: str = "m",
) -> Item:
    return Item(lane, tenant, priority, cost, size, arrived)


bands = st.builds(
    PriorityBand,
    priority=st.just(0),
    max_requests=st.integers(0, 6),
    max_bytes=st.integers(0, 20),
    fairness=st.sampled_from(["round-robin", "global-strict"]),
)
bounds = st.builds(
    FlowControlSettings,
    max_requests=st.integers(0, 8),
    max_bytes=st.integers(0, 30),
    default_priority_band=bands,
    default_negative_priority_band=bands,
)
offers = st.tuples(
    st.just("offer"),
    st.sampled_from(LANES),
    st.sampled_from(TENANTS),
    st.sampled_from(PRIORITIES),
    st.integers(1, 9),
)
steps = st.one_of(
    offers,
    offers,
    st.tuples(st.just("pop"), st.sampled_from(LANES)),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("expire"), st.sampled_from(LANES), st.integers(0, 3)),
)


@dataclass
class Model:
    """A list of who waits, the oldest first."""

    bounds: FlowControlSettings
    waiting: list[Item] = field(default_factory=list)

    def within_bounds(self, waiting: list[Item]) -> bool:
        def fits(items: list[Item], requests: int, size: int) -> bool:
            return (not requests or len(items) <= requests) and (
                not size or sum(i.size for i in items) <= size
            )

        return fits(waiting, self.bounds.max_requests, self.bounds.max_bytes) and all(
            fits(
                [i for i in waiting if i.priority == p],
                self.bounds.band(p).max_requests,
                self.bounds.band(p).max_bytes,
            )
            for p in PRIORITIES
        )

    def displaceable(self, new: Item, *, band_only: bool) -> list[Item]:
        """All that may go for ``new``: lower bands, and what other tenants of its band have beyond
        one more than its own."""
        of_tenant = defaultdict(list)
        for each in self.waiting:
            if each.priority == new.priority:
                of_tenant[each.tenant].append(each)
        keep = len(of_tenant[new.tenant]) + 1
        lower = [] if band_only else [i for i in self.waiting if i.priority < new.priority]
        return lower + [i for items in of_tenant.values() for i in items[keep:]]

    def could_take(self, new: Item) -> bool:
        gone = set(self.displaceable(new, band_only=False))
        return self.within_bounds([*(i for i in self.waiting if i not in gone), new])


@given(bounds, st.lists(steps, max_size=60))
@settings(max_examples=300, deadline=None)
def test_bounds_hold_and_everyone_leaves_once(
    bound: FlowControlSettings, script: list[tuple]
) -> None:
    queue, model = FlowQueue(bound), Model(bound)
    for now, (step, *arguments) in enumerate(script):
        match step:
            case "offer":
                lane, tenant, priority, size = arguments
                new = item(tenant, priority, lane=lane, size=size, arrived=now)
                offer = queue.offer(new)
                if offer.accepted:
                    allowed = set(model.displaceable(new, band_only=False))
                    assert set(offer.evicted) <= allowed
                    assert len(set(offer.evicted)) == len(offer.evicted)
                    if model.within_bounds([*model.waiting, new]):
                        assert not offer.evicted
                    model.waiting = [i for i in model.waiting if i not in offer.evicted]
                    model.waiting.append(new)
                else:
                    assert not offer.evicted
                    assert not model.could_take(new)
            case "pop":
                (lane,) = arguments
                here = [i for i in model.waiting if i.lane == lane]
                popped = queue.pop(lane)
                if not here:
                    assert popped is None
                    continue
                assert popped is not None
                urgent = [i for i in here if i.priority == max(i.priority for i in here)]
                strict = bound.band(popped.priority).fairness == "global-strict"
                flow = [i for i in urgent if strict or i.tenant == popped.tenant]
                assert popped is flow[0]
                model.waiting.remove(popped)
            case "cancel":
                if model.waiting:
                    gone = model.waiting.pop(arguments[0] % len(model.waiting))
                    queue.remove(gone)
                    assert gone not in queue
            case "expire":
                lane, ago = arguments
                expired = [i for i in model.waiting if i.lane == lane and i.arrived <= now - ago]
                assert queue.expire(lane, now - ago) == expired
                model.waiting = [i for i in model.waiting if i not in expired]
        assert model.within_bounds(model.waiting)
        assert (queue.requests, queue.bytes) == (
            len(model.waiting),
            sum(i.size for i in model.waiting),
        )
        assert queue.sizes() == {
            p: (len(items), sum(i.size for i in items))
            for p in PRIORITIES
            if (items := [i for i in model.waiting if i.priority == p])
        }
        for lane in LANES:
            here = [i for i in model.waiting if i.lane == lane]
            assert queue.waiting(lane) == len(here)
            for p in PRIORITIES:
                assert queue.ahead_of(lane, p) == sum(i.priority >= p for i in here)
    assert sorted(i.arrived for i in queue.clear()) == [i.arrived for i in model.waiting]
    assert (queue.requests, queue.lanes(), queue.sizes()) == (0, [], {})


@given(
    st.lists(
        st.tuples(st.sampled_from(TENANTS), st.floats(1, 100)),
        min_size=1,
        max_size=200,
    )
)
@settings(deadline=None)
def test_tenants_that_wait_get_equal_shares_within_one_request_each(
    wants: list[tuple[str, float]],
) -> None:
    queue = FlowQueue(FlowControlSettings())
    largest: dict[str, float] = defaultdict(float)
    left: Counter[str] = Counter()
    for tenant, cost in wants:
        assert queue.offer(item(tenant, cost=cost)).accepted
        largest[tenant] = max(largest[tenant], cost)
        left[tenant] += 1
    given: dict[str, float] = dict.fromkeys(largest, 0.0)
    while (next_ := queue.pop("m")) is not None:
        given[next_.tenant] += next_.cost
        left[next_.tenant] -= 1
        waiting = [tenant for tenant in left if left[tenant]]
        for one in waiting:
            for other in waiting:
                assert abs(given[one] - given[other]) <= largest[one] + largest[other] + 1e-6


def test_a_tenant_that_comes_late_gets_its_share_from_now_on_and_nothing_for_before() -> None:
    queue = FlowQueue(FlowControlSettings())
    for _ in range(100):
        queue.offer(item("a"))
    for _ in range(50):
        queue.pop("m")
    for _ in range(100):
        queue.offer(item("b"))
    served = Counter(popped.tenant for _ in range(40) if (popped := queue.pop("m")))
    assert served == {"a": 20, "b": 20}


def test_a_flood_of_one_tenant_does_not_close_the_door_to_another() -> None:
    queue = FlowQueue(FlowControlSettings(max_requests=10))
    flood = [item("a", arrived=n) for n in range(10)]
    for each in flood:
        assert queue.offer(each).accepted
    assert not queue.offer(item("a")).accepted
    evicted = [queue.offer(item("b", arrived=20)).evicted for _ in range(5)]
    assert evicted == [(victim,) for victim in reversed(flood[5:])]  # the newest go
    assert not queue.offer(item("b")).accepted  # five each: nobody has too many
    assert queue.offer(item("c")).accepted


def test_what_may_be_shed_goes_first_then_the_lowest_priority() -> None:
    queue = FlowQueue(FlowControlSettings(max_requests=3))
    low, normal, high = item(priority=-5), item(priority=0), item(priority=5)
    for each in (low, normal, high):
        assert queue.offer(each).accepted
    assert not queue.offer(item("x", priority=-5)).accepted
    assert queue.offer(item(priority=9)).evicted == (low,)
    assert queue.offer(item(priority=9)).evicted == (normal,)
    assert queue.offer(item(priority=9)).evicted == (high,)
    assert not queue.offer(item(priority=9)).accepted


def test_nobody_is_evicted_for_a_request_that_would_not_fit_all_the_same() -> None:
    queue = FlowQueue(FlowControlSettings(max_bytes=10))
    queue.offer(item(priority=-1, size=5))
    queue.offer(item(priority=3, size=5))
    assert queue.offer(item(priority=0, size=8)).evicted == ()
    assert queue.requests == 2


def test_bounds_of_a_band_are_its_own() -> None:
    queue = FlowQueue(
        FlowControlSettings(
            priority_bands=(PriorityBand(priority=1, max_requests=1),),
            default_priority_band=PriorityBand(max_requests=2),
        )
    )
    assert queue.offer(item(priority=1)).accepted
    assert not queue.offer(item(priority=1)).accepted  # lower bands are not in its way
    assert [queue.offer(item(priority=0)).accepted for _ in range(3)] == [True, True, False]
    assert queue.offer(item(priority=2)).accepted


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PriorityBand(max_requests=-1), "max_requests is -1; it must be a number ≥ 0"),
        (lambda: PriorityBand(fairness="edf"), "fairness is 'edf'; it must be round-robin or"),  # type: ignore[arg-type]
        (lambda: FlowControlSettings(default_request_ttl=-1.0), "default_request_ttl is -1.0"),
        (
            lambda: FlowControlSettings(priority_bands=(PriorityBand(2), PriorityBand(2))),
            "priority_bands has priority 2 twice",
        ),
    ],
)
def test_wrong_settings_name_the_field(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
