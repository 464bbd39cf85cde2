"""Who waits, and who is next: priority bands, tenants in them, first come first served in each.

The engines queue in order of arrival and know no tenants. What must not wait behind a flood has to
be sorted before it reaches them; this is where.

Bands are strict: the next request is one of the highest priority that waits. Within a band tenants
share by start-time fair queueing (Goyal, Vin, Cheng 1996): each tenant has a virtual time that
grows by the cost of what it was given, and the lowest is next. While two tenants both wait, what
they were given differs by at most the largest cost of one's requests plus that of the other's.

The queue is also fair at its door. Full, it gives a place to a higher priority at the expense of
the lowest, and to a tenant with few requests at the expense of the one with most in its band: the
newest there is evicted, as it has waited least.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from dynamo_epp.admission.settings import FlowControlSettings, PriorityBand


@dataclass(slots=True, eq=False)
class Item:
    """A request that waits. ``lane`` names the endpoints it waits for: its (base) model."""

    lane: str
    tenant: str
    priority: int
    cost: float  # tokens
    size: int  # bytes of its body
    arrived: float  # seconds


@dataclass(frozen=True, slots=True)
class Offer:
    """What became of an offered item, and at whose expense."""

    accepted: bool
    evicted: tuple[Item, ...] = ()


class _Flow:
    """One tenant's requests in one lane of a band."""

    __slots__ = ("items", "start")

    def __init__(self, start: float) -> None:
        self.items: dict[Item, None] = {}  # the oldest first
        self.start = start  # virtual time at which its next request begins


class _FairLane:
    """Start-time fair queueing between the tenants of one lane and band."""

    def __init__(self) -> None:
        self._flows: dict[str, _Flow] = {}  # those with requests
        self._finish: dict[str, float] = {}  # tenant -> virtual end of what it was given
        self._heap: list[tuple[float, int, str, _Flow]] = []  # (start, turn, tenant, flow)
        self._virtual = 0.0
        self._turn = 0
        self.requests = 0

    def push(self, tenant: str, item: Item) -> None:
        flow = self._flows.get(tenant)
        if flow is None:
            start = max(self._virtual, self._finish.get(tenant, 0.0))
            flow = self._flows[tenant] = _Flow(start)
            self._due(tenant, flow)
        flow.items[item] = None
        self.requests += 1

    def _due(self, tenant: str, flow: _Flow) -> None:
        self._turn += 1
        heapq.heappush(self._heap, (flow.start, self._turn, tenant, flow))

    def pop(self) -> Item:
        """The next item. There must be one."""
        while True:
            start, _, tenant, flow = heapq.heappop(self._heap)
            if self._flows.get(tenant) is flow:  # else it was emptied by cancellations
                break
        item = next(iter(flow.items))
        del flow.items[item]
        self.requests -= 1
        self._virtual = start
        flow.start = self._finish[tenant] = start + item.cost
        if flow.items:
            self._due(tenant, flow)
        else:
            self._end(tenant)
        return item

    def remove(self, tenant: str, item: Item) -> None:
        flow = self._flows[tenant]
        del flow.items[item]
        self.requests -= 1
        if not flow.items:
            self._end(tenant)

    def _end(self, tenant: str) -> None:
        del self._flows[tenant]
        if not self._flows:  # the busy period is over, and with it what anybody had too much
            self._finish.clear()
            self._heap.clear()
            self._virtual = 0.0
        elif len(self._finish) > 2 * len(self._flows) + 64:
            now = self._virtual
            self._finish = {t: end for t, end in self._finish.items() if end > now}


class _Band:
    def __init__(self, bounds: PriorityBand) -> None:
        self.bounds = bounds
        self.requests = 0
        self.bytes = 0
        self.lanes: dict[str, _FairLane] = {}
        self.tenants: dict[str, dict[Item, None]] = {}  # the oldest first

    def _flow(self, item: Item) -> str:
        return item.tenant if self.bounds.fairness == "round-robin" else ""

    def push(self, item: Item) -> None:
        self.requests += 1
        self.bytes += item.size
        self.tenants.setdefault(item.tenant, {})[item] = None
        self.lanes.setdefault(item.lane, _FairLane()).push(self._flow(item), item)

    def pop(self, lane: str) -> Item:
        item = self.lanes[lane].pop()
        self._forget(item)
        return item

    def remove(self, item: Item) -> None:
        self.lanes[item.lane].remove(self._flow(item), item)
        self._forget(item)

    def _forget(self, item: Item) -> None:
        self.requests -= 1
        self.bytes -= item.size
        waiting = self.tenants[item.tenant]
        del waiting[item]
        if not waiting:
            del self.tenants[item.tenant]
        if not self.lanes[item.lane].requests:
            del self.lanes[item.lane]

    def victims(self, fewest: int = 0) -> Iterator[Item]:
        """Who goes first if somebody must: the newest of the tenant that has most waiting, as long
        as it keeps at least ``fewest``."""
        heap = [(-len(items), tenant) for tenant, items in self.tenants.items()]
        heapq.heapify(heap)
        newest = {tenant: reversed(items) for tenant, items in self.tenants.items()}
        while heap and -heap[0][0] > fewest:
            count, tenant = heap[0]
            yield next(newest[tenant])
            if count == -1:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (count + 1, tenant))


class FlowQueue:
    """All requests that wait. Pure: time is the arrival that each item carries.

    Invariant: no bound of ``settings`` is exceeded, and each item offered and accepted leaves
    exactly once, by ``pop``, ``remove``, ``expire``, ``clear`` or an ``Offer``'s ``evicted``.
    Items are offered in the order of their arrival.
    """

    def __init__(self, settings: FlowControlSettings) -> None:
        self._settings = settings
        self._bands: dict[int, _Band] = {}  # by priority; those with requests
        self._lanes: dict[str, dict[Item, None]] = {}  # the oldest first
        self.requests = 0
        self.bytes = 0

    def __contains__(self, item: Item) -> bool:
        return item in self._lanes.get(item.lane, ())

    def lanes(self) -> list[str]:
        """Lanes in which somebody waits."""
        return list(self._lanes)

    def waiting(self, lane: str) -> int:
        """Requests in ``lane``."""
        return len(self._lanes.get(lane, ()))

    def sizes(self) -> dict[int, tuple[int, int]]:
        """Priority -> (requests, bytes), of bands that are not empty."""
        return {p: (band.requests, band.bytes) for p, band in self._bands.items()}

    def ahead_of(self, lane: str, priority: int) -> int:
        """Requests in ``lane`` that would be served before a new one of ``priority``, if no other
        came: all of its band and of those above."""
        return sum(
            band.lanes[lane].requests
            for p, band in self._bands.items()
            if p >= priority and lane in band.lanes
        )

    def offer(self, item: Item) -> Offer:
        """Queue ``item`` if there is a place for it, or if others have to make one."""
        evicted = self._evictions(item)
        if evicted is None:
            return Offer(False)
        for victim in evicted:
            self.remove(victim)
        band = self._bands.get(item.priority)
        if band is None:
            band = self._bands[item.priority] = _Band(self._settings.band(item.priority))
        band.push(item)
        self._lanes.setdefault(item.lane, {})[item] = None
        self.requests += 1
        self.bytes += item.size
        return Offer(True, tuple(evicted))

    def pop(self, lane: str) -> Item | None:
        """Take the next request of ``lane``."""
        if lane not in self._lanes:
            return None
        priority = max(p for p, band in self._bands.items() if lane in band.lanes)
        item = self._bands[priority].pop(lane)
        self._forget(item)
        return item

    def remove(self, item: Item) -> None:
        """Take out an item that waits."""
        self._bands[item.priority].remove(item)
        self._forget(item)

    def expire(self, lane: str, before: float) -> list[Item]:
        """Take out what arrived in ``lane`` at ``before`` or earlier."""
        expired = []
        for item in self._lanes.get(lane, ()):
            if item.arrived > before:
                break
            expired.append(item)
        for item in expired:
            self.remove(item)
        return expired

    def clear(self) -> list[Item]:
        """Take out everything."""
        everything = [item for items in self._lanes.values() for item in items]
        for item in everything:
            self.remove(item)
        return everything

    def _forget(self, item: Item) -> None:
        self.requests -= 1
        self.bytes -= item.size
        lane = self._lanes[item.lane]
        del lane[item]
        if not lane:
            del self._lanes[item.lane]
        if not self._bands[item.priority].requests:
            del self._bands[item.priority]

    def _evictions(self, item: Item) -> list[Item] | None:
        """Who has to go for ``item`` to fit; ``None`` if nobody may."""
        settings, bounds = self._settings, self._settings.band(item.priority)
        band = self._bands.get(item.priority)
        too_many = _excess(self.requests + 1, settings.max_requests)
        too_large = _excess(self.bytes + item.size, settings.max_bytes)
        of_band = _excess((band.requests if band else 0) + 1, bounds.max_requests)
        in_band = _excess((band.bytes if band else 0) + item.size, bounds.max_bytes)
        evicted: list[Item] = []
        if band is not None and (of_band > 0 or in_band > 0):
            for victim in _own_band(band, item):
                evicted.append(victim)
                of_band, in_band = of_band - 1, in_band - victim.size
                too_many, too_large = too_many - 1, too_large - victim.size
                if of_band <= 0 and in_band <= 0:
                    break
        if of_band > 0 or in_band > 0:
            return None
        if too_many <= 0 and too_large <= 0:
            return evicted
        gone = set(evicted)
        for victim in self._anywhere(band, item):
            if victim in gone:
                continue
            evicted.append(victim)
            too_many, too_large = too_many - 1, too_large - victim.size
            if too_many <= 0 and too_large <= 0:
                return evicted
        return None

    def _anywhere(self, band: _Band | None, item: Item) -> Iterator[Item]:
        for priority in sorted(p for p in self._bands if p < item.priority):
            yield from self._bands[priority].victims()
        if band is not None:
            yield from _own_band(band, item)


def _own_band(band: _Band, item: Item) -> Iterator[Item]:
    return band.victims(fewest=len(band.tenants.get(item.tenant, ())) + 1)


def _excess(amount: int, bound: int) -> int:
    return amount - bound if bound else 0
