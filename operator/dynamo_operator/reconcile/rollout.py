"""Rolling out workers by generations, and telling that a new generation fails.

Where prefill and decode workers are apart, each generation has Deployments of its own, and one that
is half there is worth nothing: its scarcest role decides how much of it counts. So the old one
shrinks in all roles together, only by what the new one can already take over.

Pure: counts in, counts out. Source of surge and unavailability: Kubernetes' Deployments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dynamo_operator.diagnosis.fields import at, condition, label, moment
from dynamo_operator.diagnosis.pods import Trouble, is_ready, trouble
from dynamo_operator.reconcile import progress
from dynamo_operator.reconcile.observed import Json, Observed
from dynamo_operator.render import names

DEFAULT_BOUND = "25%"


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a rollout may go above and below the wanted number: counts or percentages."""

    surge: int | str = DEFAULT_BOUND
    unavailable: int | str = DEFAULT_BOUND

    def of(self, replicas: int) -> tuple[int, int]:
        """(pods above, pods below) for so many replicas; both zero would be a standstill."""
        surge = _count(self.surge, replicas, math.ceil)
        unavailable = min(replicas, _count(self.unavailable, replicas, math.floor))
        return (1 if surge == unavailable == 0 else surge), unavailable


def _count(bound: int | str, replicas: int, rounded: Any) -> int:
    if isinstance(bound, int):
        return max(0, bound)
    text = bound.strip()
    if text.endswith("%") and text[:-1].isdigit():
        return int(rounded(int(text[:-1]) * replicas / 100))
    if text.isdigit():
        return int(text)
    return _count(DEFAULT_BOUND, replicas, rounded)


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload of one generation, as it is."""

    name: str
    component: str
    replicas: int
    """What its spec says."""
    ready: int


@dataclass(frozen=True, slots=True)
class Step:
    """The numbers to set next."""

    new: Mapping[str, int]
    """Component -> replicas of its workload of the new generation."""
    old: Mapping[str, int]
    """Name of an old workload -> replicas."""


def step(
    wanted: Mapping[str, int],
    new: Mapping[str, Workload],
    old: Sequence[Workload],
    bounds: Mapping[str, Bounds],
) -> Step:
    """The next step from the `old` generations to the `new` one.

    `wanted`: component -> replicas; `new`: component -> its workload, where it exists; `old`: the
    workloads of all earlier generations, those to be given up first at the front; `bounds` by
    component. Repeated as pods become ready, it ends with `new` at `wanted` and `old` at 0. In
    each role at least wanted - unavailable of the ready pods stay, the new ones counted only as
    far as all roles of their generation are there; at most wanted + surge exist.
    """
    share = (
        min(
            (min(1.0, new[name].ready / count) if name in new else 0.0)
            for name, count in wanted.items()
            if count > 0
        )
        if any(wanted.values())
        else 1.0
    )
    whole = share >= 1.0
    to_new: dict[str, int] = {}
    to_old: dict[str, int] = {}
    for name, count in wanted.items():
        surge, unavailable = bounds.get(name, Bounds()).of(count)
        mine = [workload for workload in old if workload.component == name]
        running = new[name].replicas if name in new else 0
        counted = count if whole else math.floor(share * count)
        left = 0 if whole else max(0, count - unavailable - counted)
        to_old |= _shrunk(mine, left)
        room = count + surge - sum(workload.replicas for workload in mine)
        to_new[name] = min(count, max(room, running, 0))
    for workload in old:
        if workload.component not in wanted:
            # A role that is no more serves until the new generation does.
            to_old[workload.name] = 0 if whole else workload.replicas
    return Step(to_new, to_old)


def _shrunk(workloads: Sequence[Workload], left: int) -> dict[str, int]:
    """Numbers for `workloads` (first ones given up first) so that `left` pods stay: ready ones
    first, then others. Pods that are not ready at the moment may be so again in the next: as many
    as are needed stay, as in a Deployment."""
    result = dict.fromkeys((workload.name for workload in workloads), 0)
    for workload in reversed(workloads):
        result[workload.name] = min(workload.replicas, workload.ready, left)
        left -= result[workload.name]
    for workload in reversed(workloads):
        more = min(workload.replicas - result[workload.name], left)
        result[workload.name] += more
        left -= more
    return result


# --- failing


PATIENCE_S = 60.0
"""So long a pod may have a trouble of its own before its template counts as failing: a registry
hiccups, a Secret is applied a moment later. Containers that crash are counted, not timed."""


@dataclass(frozen=True, slots=True)
class Failing:
    """What is to be said of a generation of workers."""

    why: str = ""
    """Why its containers fail, in one sentence; "" if they don't, or not for certain yet."""
    look_again_s: float | None = None
    """In so many seconds more will be certain; None: nothing is open."""


def failing(observed: Observed, worker_hash: str, workers: Iterable[str]) -> Failing:
    """Whether what is in a generation's pods fails.

    It does if in one component no pod is ready and one has a trouble that will not heal by itself
    (an image that can't be pulled, a container that keeps crashing) and has had its time; or if,
    ready pods or not, its workload has passed its deadline and a container is to blame. A pod that
    waits for a node, a quota or a volume is no failure of what is in it.
    """
    pods: dict[str, list[Json]] = {name: [] for name in workers}
    for pod in observed.pods:
        labels = pod["metadata"].get("labels") or {}
        component = labels.get(names.COMPONENT_LABEL, "")
        if labels.get(names.WORKER_HASH_LABEL) == worker_hash and component in pods:
            pods[component].append(pod)
    open_s: list[float] = []
    for component, members in sorted(pods.items()):
        found = [(pod, why) for pod in members if (why := trouble(pod)) is not None]
        found.sort(key=lambda entry: (entry[1].rank, entry[1].detail))
        blamed = _blamed([why for _, why in found])
        if blamed is not None and _stands_still(observed, component, worker_hash):
            return Failing(
                f"component {component}: no progress within its deadline:"
                f" {blamed.reason}: {blamed.detail}"
            )
        if any(is_ready(pod) for pod in members):
            continue
        for pod, why in found:
            if why.fault != "template" or not why.lasting:
                continue
            wait_s = 0.0 if why.counted else PATIENCE_S - _age_s(pod, observed.at)
            if wait_s <= 0:
                return Failing(f"component {component}: {why.reason}: {why.detail}")
            open_s.append(wait_s)
    return Failing(look_again_s=min(open_s) if open_s else None)


def _blamed(troubles: Sequence[Trouble]) -> Trouble | None:
    """The trouble, the most telling first, that keeps a container that could run from being ready;
    None where there is none, or where the cluster may be the reason."""
    if any(why.fault == "cluster" for why in troubles):
        return None
    ran = ("Starting", "NotReady")
    return next((why for why in troubles if why.fault or why.reason in ran), None)


def _stands_still(observed: Observed, component: str, worker_hash: str) -> bool:
    """Whether the component's workload of that generation has passed its deadline, and is let
    create its pods."""
    for (kind, _), child in observed.children.items():
        spec = at(child, "spec")
        template = at(spec, "template") or at(spec, "leaderWorkerTemplate", "leaderTemplate")
        if (
            kind in ("Deployment", "LeaderWorkerSet")
            and label(child, names.COMPONENT_LABEL) == component
            and label(template, names.WORKER_HASH_LABEL) == worker_hash
            and condition(child, "ReplicaFailure").get("status") != "True"
            and progress.standstill(child, observed.at)
        ):
            return True
    return False


def _age_s(pod: Json, now: datetime | None) -> float:
    """Seconds since the pod came to its node; for ever where that, or the time, is not known."""
    since = moment(pod, "status", "startTime") or moment(pod, "metadata", "creationTimestamp")
    return math.inf if now is None or since is None else (now - since).total_seconds()
