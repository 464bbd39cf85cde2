"""Leases: never two leaders, whatever clocks and network do; and no gap longer than needed.

The real `LeaderLease` runs against a simulated API server in virtual time: hours pass in
milliseconds, answers are late or lost, each candidate's clock has its own start and speed.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import ApiError, ApiUnreachable, KubernetesClient
from dynamo_runtime.kubernetes.lease import (
    LeaderLease,
    LeaseLost,
    Observation,
    claim,
    expired,
    keep_lease,
    observe,
    released,
)
from dynamo_runtime.kubernetes.resources import LEASES
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.kube_api import serving
from tests.virtual_time import in_virtual_time

Json = dict[str, Any]


@dataclass
class Faults:
    """What happens to one request."""

    before_s: float = 0.0  # until it takes effect
    after_s: float = 0.0  # until the answer is here
    lost: bool = False  # the answer


@dataclass
class OneLease:
    """An API server that holds one lease and is reached over a bad network.

    A request that its sender gave up still arrives.
    """

    faults: Callable[[], Faults] = Faults
    lease: Json | None = None
    version: int = 0
    away: bool = False
    holders: list[str] = field(default_factory=list)  # each new one
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def _do(self, work: Callable[[], Json]) -> Json:
        faults = self.faults()

        async def arrive() -> Json:
            await asyncio.sleep(faults.before_s)
            if self.away:
                raise ApiUnreachable("away")
            return work()

        task = asyncio.create_task(arrive())
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.tasks.add(task)
        answer = await asyncio.shield(task)
        await asyncio.sleep(faults.after_s)
        if faults.lost:
            raise ApiUnreachable("the answer is lost")
        return answer

    async def get(self, path: str) -> Json:
        def read() -> Json:
            if self.lease is None:
                raise ApiError(404, "NotFound", "no lease")
            return copy.deepcopy(self.lease)

        return await self._do(read)

    async def create(self, manifest: Json) -> Json:
        def write() -> Json:
            if self.lease is not None:
                raise ApiError(409, "AlreadyExists", "there is one")
            return self._store(manifest)

        return await self._do(write)

    async def replace(self, path: str, manifest: Json) -> Json:
        def write() -> Json:
            assert self.lease is not None
            if manifest["metadata"]["resourceVersion"] != str(self.version):
                raise ApiError(409, "Conflict", "modified")
            return self._store(manifest)

        return await self._do(write)

    def _store(self, manifest: Json) -> Json:
        self.version += 1
        self.lease = copy.deepcopy(manifest)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        holder = manifest["spec"]["holderIdentity"]
        if not self.holders or self.holders[-1] != holder:
            self.holders.append(holder)
        return copy.deepcopy(self.lease)


@dataclass
class Candidate:
    """One process: it leads, loses, and stands again after a while."""

    name: str
    server: OneLease
    offset_s: float = 0.0
    speed: float = 1.0
    lease: LeaderLease = field(init=False)
    lost: int = 0
    on_lead: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.lease = LeaderLease(
            self.server,  # type: ignore[arg-type]
            "ns",
            "leader",
            self.name,
            rng=random.Random(self.name),
            clock=lambda: self.offset_s + loop.time() * self.speed,
            wall=lambda: self.offset_s + loop.time() * self.speed,
            sleep=lambda seconds: asyncio.sleep(seconds / self.speed),
        )

    async def run(self) -> None:
        while True:
            await self.lease.acquire()
            self.on_lead()
            try:
                await self.lease.hold()
            except LeaseLost:
                self.lost += 1


FAULTS = st.builds(
    Faults,
    before_s=st.sampled_from([0.0, 0.0, 0.0, 0.5, 4.0, 9.0, 14.0, 40.0]),
    after_s=st.sampled_from([0.0, 0.0, 0.0, 0.5, 4.0, 9.0, 14.0, 40.0]),
    lost=st.sampled_from([False, False, False, True]),
)


@settings(max_examples=40, deadline=None)
@given(
    faults=st.lists(FAULTS, max_size=40),
    offsets=st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)),
    speeds=st.tuples(st.floats(0.95, 1.05), st.floats(0.95, 1.05)),
    pauses=st.lists(st.tuples(st.floats(0, 60), st.floats(0, 30)), max_size=3),
)
def test_two_candidates_never_lead_at_once(
    faults: list[Faults],
    offsets: tuple[float, float],
    speeds: tuple[float, float],
    pauses: list[tuple[float, float]],
) -> None:
    async def main() -> None:
        waiting = iter(faults)
        server = OneLease(faults=lambda: next(waiting, Faults()))
        candidates = [
            Candidate(name, server, offset, speed)
            for name, offset, speed in zip("ab", offsets, speeds, strict=True)
        ]
        overlaps: list[float] = []

        def check() -> None:
            if sum(candidate.lease.held for candidate in candidates) != 1:
                overlaps.append(asyncio.get_running_loop().time())

        for candidate in candidates:
            candidate.on_lead = check
        tasks = [asyncio.create_task(candidate.run()) for candidate in candidates]

        async def outages() -> None:
            for after_s, for_s in pauses:
                await asyncio.sleep(after_s)
                server.away = True
                await asyncio.sleep(for_s)
                server.away = False

        tasks.append(asyncio.create_task(outages()))
        await asyncio.sleep(500)
        assert not overlaps
        # The faults are over: somebody leads, and it is who the server says.
        (leader,) = (candidate for candidate in candidates if candidate.lease.held)
        assert server.lease is not None
        assert server.lease["spec"]["holderIdentity"] == leader.name
        for task in [*tasks, *server.tasks]:
            task.cancel()
        await asyncio.gather(*tasks, *server.tasks, return_exceptions=True)

    in_virtual_time(main)


def test_a_crashed_leader_is_followed_after_the_duration() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = OneLease()
        first, second = Candidate("a", server), Candidate("b", server, offset_s=-1e5)
        await first.lease.acquire()  # and nothing more: it has crashed
        await second.lease.acquire()
        assert 15 <= loop.time() <= 15 + 2 * 2.4
        assert server.lease is not None
        spec = server.lease["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 1)

    in_virtual_time(main)


def test_a_leader_that_leaves_is_followed_at_once() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = OneLease()
        first, second = Candidate("a", server), Candidate("b", server)
        await first.lease.acquire()
        holding = asyncio.create_task(first.lease.hold())
        waiting = asyncio.create_task(second.lease.acquire())
        await asyncio.sleep(60)
        assert first.lease.held
        assert not second.lease.held
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        assert not first.lease.held
        left = loop.time()
        await first.lease.release()
        await waiting
        assert loop.time() - left <= 2.4
        assert second.lease.held
        await first.lease.release()  # once more changes nothing
        assert second.lease.holder == "b"
        assert server.holders == ["a", "", "b"]

    in_virtual_time(main)


def test_a_leader_that_can_not_renew_stops_before_another_may_begin() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = OneLease()
        leader = Candidate("a", server)
        await leader.lease.acquire()
        await asyncio.sleep(1)
        server.away = True
        with pytest.raises(LeaseLost, match="not renewed for 10 s") as lost:
            await leader.lease.hold()
        assert not lost.value.taken
        assert loop.time() == pytest.approx(10)

    in_virtual_time(main)


def test_a_leader_that_slept_over_its_deadline_may_not_write() -> None:
    async def main() -> None:
        leader = Candidate("a", OneLease())
        with pytest.raises(LeaseLost, match="not certain any more"):
            leader.lease.check()
        await leader.lease.acquire()
        # Nobody renews, and nothing has noticed yet.
        await asyncio.sleep(9.9)
        leader.lease.check()
        await asyncio.sleep(0.2)
        assert leader.lease.held
        with pytest.raises(LeaseLost) as lost:
            leader.lease.check()
        assert not lost.value.taken

    in_virtual_time(main)


def test_an_outage_shorter_than_the_deadline_is_survived() -> None:
    async def main() -> None:
        server = OneLease()
        leader = Candidate("a", server)
        task = asyncio.create_task(leader.run())
        await asyncio.sleep(5)
        server.away = True
        await asyncio.sleep(7)
        server.away = False
        await asyncio.sleep(60)
        assert leader.lease.held
        assert leader.lost == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    in_virtual_time(main)


def test_a_lease_taken_by_force_is_lost() -> None:
    async def main() -> None:
        server = OneLease()
        leader = Candidate("a", server)
        await leader.lease.acquire()
        assert server.lease is not None
        server.lease["spec"]["holderIdentity"] = "by hand"
        server.version += 1
        server.lease["metadata"]["resourceVersion"] = str(server.version)
        with pytest.raises(LeaseLost, match="by hand has taken it") as lost:
            await leader.lease.hold()
        assert lost.value.taken

    in_virtual_time(main)


# --- the decision ---------------------------------------------------------------------------------


def lease(holder: str = "a", *, renewed: str = "1", duration_s: int = 15, **more: Any) -> Json:
    spec = {"holderIdentity": holder, "leaseDurationSeconds": duration_s, "renewTime": renewed}
    return {"metadata": {"name": "l", "resourceVersion": "7"}, "spec": {**spec, **more}}


def test_what_does_not_move_keeps_its_time() -> None:
    first = observe(None, lease(), now=100.0)
    touched = {**lease(), "metadata": {"name": "l", "resourceVersion": "8"}}
    assert observe(first, touched, now=110.0) == Observation(touched, 100.0)
    assert observe(first, lease(renewed="2"), now=110.0).at == 110.0


@given(now=st.floats(0, 1e9), age=st.floats(0, 100), duration_s=st.integers(1, 60))
def test_a_lease_expires_by_the_observers_clock(now: float, age: float, duration_s: int) -> None:
    held = lease(duration_s=duration_s)
    assert expired(held, now, now + age) == (now + age - now >= duration_s)
    assert expired(None, now, now)
    assert expired(released(held, wall="w"), now, now)


def test_claims() -> None:
    def claimed(of: Json | None, identity: str, now: float) -> Json | None:
        return claim(Observation(of, 100.0), identity, duration_s=15, now=now, wall="w")

    new = claimed(None, "b", 100.0)
    assert new is not None
    assert new["spec"] == {
        "holderIdentity": "b",
        "leaseDurationSeconds": 15,
        "renewTime": "w",
        "acquireTime": "w",
        "leaseTransitions": 0,
    }
    held = lease("a", acquireTime="then", leaseTransitions=4, strategy="kept")
    assert claimed(held, "b", 114.9) is None
    taken = claimed(held, "b", 115.0)
    assert taken is not None
    assert taken["metadata"] == held["metadata"], "with its version: of two who claim, one fails"
    assert taken["spec"]["acquireTime"] == "w"
    assert taken["spec"]["leaseTransitions"] == 5
    assert taken["spec"]["strategy"] == "kept"
    renewed = claimed(held, "a", 101.0)
    assert renewed is not None
    assert (renewed["spec"]["acquireTime"], renewed["spec"]["leaseTransitions"]) == ("then", 4)


def test_times_that_can_not_be_safe_are_refused() -> None:
    with pytest.raises(ValueError, match="must be renewed within less than that"):
        LeaderLease(
            None,  # type: ignore[arg-type]
            "ns",
            "l",
            "me",
            duration_s=10,
            renew_within_s=10,
            rng=random.Random(1),
        )


# --- over HTTP ------------------------------------------------------------------------------------


async def test_a_lease_on_a_server() -> None:
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        first = LeaderLease(client, "ns", "l", "one", rng=random.Random(1))
        await first.acquire()
        spec = (await client.get(LEASES.path("ns", "l")))["spec"]
        assert spec["holderIdentity"] == "one"
        assert spec["renewTime"][10] == "T"
        await first.release()
        second = LeaderLease(client, "ns", "l", "two", rng=random.Random(1))
        await second.acquire()
        assert second.holder == "two"


async def test_a_kept_lease_is_renewed_whatever_fails(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        times = itertools.count()
        renewed: asyncio.Queue[Json] = asyncio.Queue()
        api.fail(500)
        api.fail(500)

        async def sleep(seconds: float) -> None:
            if found := api.objects.get((LEASES.path(), "ns", "mark")):
                renewed.put_nowait(copy.deepcopy(found["spec"]))
            await asyncio.sleep(0)

        keeping = asyncio.create_task(
            keep_lease(
                client,
                "ns",
                "mark",
                "operator",
                duration_s=30,
                renew_s=10,
                wall=lambda: float(next(times)),
                sleep=sleep,
            )
        )
        first, second = [await asyncio.wait_for(renewed.get(), 10) for _ in range(2)]
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        assert first["holderIdentity"] == "operator"
        assert first["acquireTime"] == second["acquireTime"] == "1970-01-01T00:00:00.000000Z"
        assert first["renewTime"] < second["renewTime"]
    assert caplog.text.count("is not renewed") == 1
