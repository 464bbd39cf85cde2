"""Leases: at most one leader, and a mark that somebody is still there.

Leader election as client-go does it (tools/leaderelection), on coordination.k8s.io/v1: a lease is
held while its record changes. How long a record has stood still is measured by the observer's own
monotonic clock, so wall clocks may differ by hours; two clocks must only run at about the same
speed (here: within 15/10). What to do is decided by pure functions; `LeaderLease` carries it out.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from dynamo_runtime.kubernetes.client import ApiError, Json, KubernetesClient
from dynamo_runtime.kubernetes.resources import LEASES

log = logging.getLogger(__name__)

DURATION_S = 15.0
"""How long a record must stand still before another may take the lease."""
RENEW_WITHIN_S = 10.0
"""A leader that could not renew for so long stops. Shorter than the duration: it must be gone by
the time another begins."""
RETRY_S = 2.0


class LeaseLost(Exception):
    """This process leads no more and has to stop what only a leader may do.

    ``taken``: by another; otherwise it just could not be renewed, and may be acquired again.
    """

    def __init__(self, message: str, *, taken: bool) -> None:
        super().__init__(message)
        self.taken = taken


@dataclass(frozen=True, slots=True)
class Observation:
    """A lease as its observer knows it."""

    lease: Json | None  # None: there is none
    at: float  # monotonic seconds of the observer's clock when it was first seen like this


def observe(before: Observation | None, lease: Json | None, now: float) -> Observation:
    """What is known after ``lease`` was read: one that has not moved keeps its time."""
    if before is not None and _spec(before.lease) == _spec(lease):
        return Observation(lease, before.at)
    return Observation(lease, now)


def expired(lease: Json | None, observed_at: float, now: float) -> bool:
    """Whether a lease that has not moved since ``observed_at`` (of the same clock as ``now``) binds
    nobody any more: not there, released, or not renewed in time."""
    spec = _spec(lease)
    if not spec.get("holderIdentity"):
        return True
    return now - observed_at >= float(spec.get("leaseDurationSeconds") or DURATION_S)


def claim(
    observation: Observation, identity: str, *, duration_s: float, now: float, wall: str
) -> Json | None:
    """The lease to write in order to hold it (or go on holding it); None while another does.

    ``wall`` is the time for people to read, RFC 3339 with microseconds. Fields of others are kept,
    and with them the resourceVersion, so that of two who claim at once one fails.
    """
    lease, spec = observation.lease, _spec(observation.lease)
    holder = spec.get("holderIdentity")
    if holder != identity and not expired(lease, observation.at, now):
        return None
    new = {
        **spec,
        "holderIdentity": identity,
        "leaseDurationSeconds": max(1, round(duration_s)),
        "renewTime": wall,
    }
    if holder != identity or "acquireTime" not in spec:
        new["acquireTime"] = wall
        new["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + (lease is not None)
    return {**(lease or {}), "spec": new}


def released(lease: Json, *, wall: str) -> Json:
    """The lease to write in order to hand it over at once; a second is enough to see that."""
    spec = {**_spec(lease), "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": wall}
    return {**lease, "spec": spec}


def _spec(lease: Json | None) -> Json:
    return (lease or {}).get("spec") or {}


class LeaderLease:
    """Holds one lease for this process.

    ``identity`` must be of this process alone: not a pod's name, but that and something random. A
    client of its own keeps renewals from waiting behind other requests.
    """

    def __init__(
        self,
        client: KubernetesClient,
        namespace: str,
        name: str,
        identity: str,
        *,
        duration_s: float = DURATION_S,
        renew_within_s: float = RENEW_WITHIN_S,
        renew_every_s: float = RETRY_S,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not renew_every_s < renew_within_s < duration_s:
            raise ValueError(
                f"a lease of {duration_s:g} s must be renewed within less than that "
                f"({renew_within_s:g} s) and tried more often ({renew_every_s:g} s)"
            )
        self.identity = identity
        self.held = False
        self._client = client
        self._namespace = namespace
        self._name = name
        self._path = LEASES.path(namespace, name)
        self._duration_s = duration_s
        self._renew_within_s = renew_within_s
        self._renew_every_s = renew_every_s
        self._rng = rng
        self._clock = clock
        self._wall = wall
        self._sleep = sleep
        self._observation: Observation | None = None
        self._current = False  # it is what we wrote, and nothing has contradicted it
        self._good_until = 0.0  # counts from before the write that it rests on was sent
        self._problem = ""

    @property
    def holder(self) -> str:
        """Who holds it, as far as is known; "" for nobody."""
        lease = self._observation.lease if self._observation else None
        return _spec(lease).get("holderIdentity") or ""

    async def acquire(self) -> None:
        """Return once the lease is held, however long that takes."""
        said = None
        while not await self._attempt(self._renew_within_s):
            if said != self.holder:
                said = self.holder
                log.info("lease %s: waiting; %s holds it", self._name, said or "nobody")
            await self._sleep(self._renew_every_s * self._rng.uniform(1.0, 1.2))
        self.held = True
        log.info("lease %s: held by %s", self._name, self.identity)

    async def hold(self) -> None:
        """Renew until cancelled. Raises ``LeaseLost`` when another has the lease, or when it could
        not be renewed in time, in which case another may have it soon."""
        try:
            while (left := self._good_until - self._clock()) > 0:
                await self._sleep(min(left, self._renew_every_s))
                if (left := self._good_until - self._clock()) <= 0:
                    break
                if not await self._attempt(left) and self.holder not in (self.identity, ""):
                    raise LeaseLost(f"lease {self._name}: {self.holder} has taken it", taken=True)
            message = f"lease {self._name}: not renewed for {self._renew_within_s:g} s"
            raise LeaseLost(message, taken=False)
        finally:
            self.held = False

    def check(self) -> None:
        """Raises `LeaseLost` unless the lease is held for certain, now: for the very moment of a
        write (`KubernetesClient.fence`). `hold` may be late to notice: a process that was stopped
        for longer than its lease lasts goes on first with whatever it was about to do."""
        if not self.held or self._clock() >= self._good_until:
            raise LeaseLost(f"lease {self._name}: not certain any more", taken=False)

    async def release(self) -> None:
        """Let the next one begin at once. Call it when what only a leader may do has ended."""
        self.held = False
        for _ in range(2):  # a renewal that was under way may have moved the lease meanwhile
            try:
                async with asyncio.timeout(self._renew_every_s):
                    if self.holder == self.identity and not self._current:
                        self._observation = Observation(await self._read(), self._clock())
                    lease = self._observation.lease if self._observation else None
                    if lease is None or self.holder != self.identity:
                        return
                    self._current = False
                    lease = await self._client.replace(
                        self._path, released(lease, wall=self._now())
                    )
                    self._observation = Observation(lease, self._clock())
                    log.info("lease %s: released", self._name)
                    return
            except TimeoutError:
                problem = "no answer in time"
            except ApiError as error:
                problem = str(error)
        log.warning("lease %s: not released, it has to expire: %s", self._name, problem)

    async def _attempt(self, timeout_s: float) -> bool:
        """Try once to hold the lease, or to go on holding it; whether that is certain now."""
        problem = ""
        try:
            async with asyncio.timeout(timeout_s):
                if not self._current:
                    lease = await self._read()
                    self._observation = observe(self._observation, lease, self._clock())
                assert self._observation is not None
                began = self._clock()
                wanted = claim(
                    self._observation,
                    self.identity,
                    duration_s=self._duration_s,
                    now=began,
                    wall=self._now(),
                )
                self._current = False  # until the answer is here
                if wanted is None:
                    return False
                written = await self._write(wanted)
                self._observation = Observation(written, self._clock())
                self._current = True
                self._good_until = began + self._renew_within_s
                return True
        except TimeoutError:
            problem = f"no answer within {timeout_s:g} s"
        except ApiError as error:
            if error.status != 409:  # another was faster; the next attempt will see who
                problem = str(error)
        finally:
            if problem and problem != self._problem:
                log.warning("lease %s: %s", self._name, problem)
            self._problem = problem
        return False

    async def _read(self) -> Json | None:
        try:
            return await self._client.get(self._path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _write(self, lease: Json) -> Json:
        if "metadata" in lease:
            return await self._client.replace(self._path, lease)
        return await self._client.create(
            {**_named(self._namespace, self._name), "spec": lease["spec"]}
        )

    def _now(self) -> str:
        return _micro_time(self._wall())


async def keep_lease(
    client: KubernetesClient,
    namespace: str,
    name: str,
    identity: str,
    *,
    duration_s: float,
    renew_s: float,
    field_manager: str = "dynamo",
    on_renewed: Callable[[float], None] = lambda sent: None,
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Keep a lease that says that ``identity`` is here, until cancelled; it then expires.

    For marks that nobody competes for. Failures are logged and the next renewal tries again, sooner
    while the lease has never stood; ``on_renewed`` is called each time that it was written, with
    the time of ``clock`` when that was sent: others may count from then.
    """
    problem = ""
    stands = False
    acquired = _micro_time(wall())
    while True:
        spec = {
            "holderIdentity": identity,
            "leaseDurationSeconds": round(duration_s),
            "acquireTime": acquired,
            "renewTime": _micro_time(wall()),
        }
        sent = clock()
        before, problem = problem, ""
        try:
            await client.apply(
                {**_named(namespace, name), "spec": spec}, field_manager=field_manager
            )
            stands = True
            on_renewed(sent)
        except ApiError as error:
            problem = str(error)
            if problem != before:
                log.warning("lease %s/%s is not renewed: %s", namespace, name, problem)
        await sleep(renew_s if stands else min(renew_s, RETRY_S))


def _named(namespace: str, name: str) -> Json:
    return {
        "apiVersion": LEASES.api_version,
        "kind": LEASES.kind,
        "metadata": {"name": name, "namespace": namespace},
    }


def _micro_time(wall: float) -> str:
    """A Kubernetes MicroTime."""
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
