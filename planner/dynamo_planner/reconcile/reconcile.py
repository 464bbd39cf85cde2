"""The stage: proposals in, one number out, and the reason for it.

Reasons to keep still come first, each said; then the loops are merged; then the move is slowed
down. Up is a matter of seconds, down of minutes: of what was found right within
`scale_up_stabilization_seconds` the least counts, within `scale_down_stabilization_seconds` the
most, as in Kubernetes' HorizontalPodAutoscaler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynamo_planner.config.model import PlannerConfig, Role
from dynamo_planner.fleet import Fleet, desired
from dynamo_planner.observe import RoleView
from dynamo_planner.propose import Proposal
from dynamo_planner.reconcile.memory import RoleMemory


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many replicas a role should have, limits aside."""

    role: Role
    replicas: int
    state: str  # of the reactive loop, in Dynamo's words
    reason: str
    held: bool = False  # nothing was weighed: it stays as it is
    clamped: bool = False  # another number was right, but not for long enough


def reconcile(
    memory: RoleMemory,
    at: float,
    view: RoleView,
    fleet: Fleet,
    reactive: Proposal | None,
    predictive: Proposal | None,
    config: PlannerConfig,
    *,
    clock_jumped: bool = False,
    scaled_by_others: str = "",
) -> tuple[Verdict, RoleMemory]:
    """The verdict on ``view.role``, whose components are ``fleet``.

    ``reactive`` is None where that loop does not run, ``predictive`` where it has said nothing new.
    ``scaled_by_others`` says who was found to have set replicas, "" for nobody.
    """
    now = desired(fleet)
    memory = _follow(memory, at, view, fleet, now, config, clock_jumped, bool(scaled_by_others))
    if predictive is not None:
        memory = replace(memory, floor=predictive)
    still = _stillness(memory, at, view, now, config, scaled_by_others)
    floor = memory.floor
    if still is not None:
        state, why = still
        # A change in progress does not keep the predictive loop from asking for more on top.
        if state == "scaling_in_progress" and floor is not None and floor.replicas > now:
            return _moved(memory, at, view.role, floor.replicas, "no_change", floor.reason)
        return Verdict(view.role, now, state, why, held=True), memory
    return _weighed(memory, at, view.role, now, reactive, config)


def _follow(
    memory: RoleMemory,
    at: float,
    view: RoleView,
    fleet: Fleet,
    now: int,
    config: PlannerConfig,
    clock_jumped: bool,
    scaled_by_others: bool,
) -> RoleMemory:
    """Bring the memory up to ``at``, before anything is decided."""
    if clock_jumped:  # times remembered mean nothing any more: begin to wait anew
        memory = RoleMemory(
            desired=memory.desired, looks=memory.looks, floor=memory.floor, up_at=at
        )
    since = memory.changing_since
    settled = all(component.settled for component in fleet)
    if settled or (since is not None and at - since > config.scaling_timeout_seconds):
        since = None
    if not settled and now != memory.desired:
        since = at
    blind = view.blind
    longest = max(config.scale_down_stabilization_seconds, config.scale_up_stabilization_seconds)
    window = at - longest - config.load_adjustment_interval_seconds
    grown = memory.desired is not None and now > memory.desired
    memory = replace(
        memory,
        desired=now,
        up_at=at if grown else memory.up_at,
        changing_since=since,
        blind_since=(at if memory.blind_since is None else memory.blind_since) if blind else None,
        looks=memory.looks + (view.seen > 0),
        wanted=tuple(entry for entry in memory.wanted if entry[0] > window),
    )
    if scaled_by_others:
        until = at + config.scale_down_stabilization_seconds
        memory = replace(memory, yielding_until=until, wanted=(), watched_since=None)
    if blind:
        memory = replace(memory, watched_since=None)
    return memory


def _stillness(
    memory: RoleMemory,
    at: float,
    view: RoleView,
    now: int,
    config: PlannerConfig,
    scaled_by_others: str,
) -> tuple[str, str] | None:
    """Why nothing is decided: state and sentence; None if it is."""
    if view.blind and memory.blind_since is not None:
        return (
            "no_fpm_data",
            f"nothing was heard of any of {view.ready} workers for "
            f"{at - memory.blind_since:.0f} s; {now} replicas are kept",
        )
    if scaled_by_others:
        return "no_change", f"{scaled_by_others}; that is respected"
    if memory.yielding_until is not None and at < memory.yielding_until:
        left = memory.yielding_until - at
        return "no_change", f"somebody else scaled; {now} replicas are kept for {left:.0f} s more"
    if memory.changing_since is not None:
        return (
            "scaling_in_progress",
            f"waiting for a change that began {at - memory.changing_since:.0f} s ago",
        )
    if view.ready == 0 and now > 0:
        return "worker_count_mismatch", f"none of {now} workers is ready"
    if memory.looks < config.load_min_observations:
        looks = f"{memory.looks} of {config.load_min_observations}"
        return "insufficient_data", f"the workers have been looked at {looks} times"
    return None


def _weighed(
    memory: RoleMemory,
    at: float,
    role: Role,
    now: int,
    reactive: Proposal | None,
    config: PlannerConfig,
) -> tuple[Verdict, RoleMemory]:
    floor = memory.floor
    state, reason = "disabled", "no loop has said anything yet"
    wanted = now
    if reactive is not None:
        wanted, state, reason = reactive.replicas, reactive.state, reactive.reason
        if floor is not None and floor.replicas > wanted:
            if state == "scale_down":
                state = "scale_down_capped_by_throughput"
            wanted, reason = floor.replicas, floor.reason
    elif floor is not None:
        wanted, reason = floor.replicas, floor.reason
    if wanted > now and floor is not None and floor.replicas == wanted:
        return _moved(memory, at, role, wanted, state, reason)  # foreseen: that was no moment
    if wanted > now:
        memory = _recommended(memory, at, wanted)
        least, lasting = _lasting(memory, at, config)
        if memory.up_at is not None and at - memory.up_at < config.scale_up_cooldown_seconds:
            why = f"{reason}; the last step up is too recent"
        elif not lasting or least <= now:
            why = f"{reason}; for less than {config.scale_up_stabilization_seconds:g} s"
        else:
            return Verdict(role, least, state, reason), memory
        least = now if floor is None else max(now, floor.replicas)
        return Verdict(role, least, "no_change", why, clamped=True), memory
    memory = _recommended(memory, at, wanted)
    since = memory.watched_since
    window = at - config.scale_down_stabilization_seconds
    highest = max(replicas for time, replicas in memory.wanted if time > window)
    patient = since is not None and at - since >= config.scale_down_stabilization_seconds
    if wanted == now:
        return Verdict(role, now, state, reason), memory
    if highest >= now or not patient:
        why = f"{reason}; too much for less than {config.scale_down_stabilization_seconds:g} s"
        return Verdict(role, now, "no_change", why, clamped=True), memory
    return Verdict(role, highest, state, reason), memory


def _moved(
    memory: RoleMemory, at: float, role: Role, replicas: int, state: str, reason: str
) -> tuple[Verdict, RoleMemory]:
    """A step up."""
    return Verdict(role, replicas, state, reason), _recommended(memory, at, replicas)


def _lasting(memory: RoleMemory, at: float, config: PlannerConfig) -> tuple[int, bool]:
    """The least that was found right in the last `scale_up_stabilization_seconds`, and whether the
    looks reach back so far. Looks are not exactly an interval apart: half of one is tolerated."""
    stabilization = config.scale_up_stabilization_seconds
    half = min(config.load_adjustment_interval_seconds, stabilization) / 2
    since = at - stabilization
    recent = [entry for entry in memory.wanted if entry[0] >= since - half]
    return min(replicas for _, replicas in recent), recent[0][0] <= since + half


def _recommended(memory: RoleMemory, at: float, replicas: int) -> RoleMemory:
    since = at if memory.watched_since is None else memory.watched_since
    return replace(memory, wanted=(*memory.wanted, (at, replicas)), watched_since=since)
