"""The reactive loop for the targets load, throughput and latency: thresholds on queue and KV use.

One worker above its threshold is enough for more; fewer needs all of them, each seen, below
theirs, and room in those that stay. So what is not seen can only keep a replica, never take one.
Thresholds of throughput and latency: Dynamo 1.6 (`builtin_load_propose`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynamo_planner.config.model import PlannerConfig, Role
from dynamo_planner.observe import RoleView, WorkerLoad
from dynamo_planner.propose.proposal import Proposal

ROOM = 0.8
"""Share of the upper threshold that the load of those who stay may come to."""
LARGEST_SHARE = 4
"""Of this many replicas one may go in a step."""
TYPICAL_CONTEXT = 8192.0
"""Longest request, tokens, of an engine that does not tell."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Of one figure of a worker: above ``up`` it has too much to do, below ``down`` too little."""

    figure: str  # in words
    up: float
    down: float
    unit: str = "%"


def thresholds(role: Role, config: PlannerConfig) -> Thresholds:
    """What ``role`` is judged by. Prefill: queued tokens, for throughput and latency as a share of
    the longest request; the others: KV cache in use and waited for."""
    target = config.optimization_target
    if role == "prefill":
        if target == "load":
            up, down = config.prefill_scale_up_queue_tokens, config.prefill_scale_down_queue_tokens
            return Thresholds("queued tokens", float(up or 0), float(down or 0), " tokens")
        up_share, down_share = (10.0, 0.0) if target == "latency" else (100.0, 10.0)
        return Thresholds("queued tokens of the longest request", up_share, down_share)
    if target == "load":
        up_rate, down_rate = config.decode_scale_up_kv_rate, config.decode_scale_down_kv_rate
        return Thresholds("KV cache use", float(up_rate or 0), float(down_rate or 0))
    up_share, down_share = (40.0, 10.0) if target == "latency" else (100.0, 60.0)
    return Thresholds("KV cache use", up_share, down_share)


def figure(load: WorkerLoad, role: Role, config: PlannerConfig) -> float:
    """The figure that ``thresholds`` is about."""
    if role != "prefill":
        return 100 * load.kv_load
    if config.optimization_target == "load":
        return load.queued_tokens
    return 100 * load.queued_tokens / (load.context_tokens or TYPICAL_CONTEXT)


def propose_by_load(view: RoleView, desired: int, config: PlannerConfig) -> Proposal:
    """How many replicas a role with ``desired`` ones should have by what its workers do now.

    Up: as many as bring the mean to the threshold, one at least, ``max_load_scaling_replicas`` at
    most. Down: as many as leave room, a quarter at most, because load rises faster than it is
    crowded together. Monotone: where every figure is higher, not fewer are proposed.
    """
    limits = thresholds(view.role, config)
    if not view.seen:
        why = "no worker is ready" if not view.ready else "no worker gives figures"
        return Proposal(view.role, desired, "no_fpm_data", why)
    figures = [figure(load, view.role, config) for load in view.loads]
    highest, total = max(figures), sum(figures) * view.ready / view.seen
    what = f"{limits.figure} is {highest:.0f}{limits.unit} at the fullest of {view.seen} workers"
    if highest > limits.up:
        needed = math.ceil(total / limits.up) if limits.up else desired + 1
        most = desired + config.max_load_scaling_replicas
        replicas = min(max(needed, desired + 1), most)
        return Proposal(
            view.role, replicas, "scale_up", f"{what}, above {limits.up:g}{limits.unit}"
        )
    calm = highest < limits.down or highest == 0
    if not calm or desired <= 1:
        return Proposal(view.role, desired, "no_change", what)
    if not view.whole:
        return Proposal(view.role, desired, "insufficient_data", f"{what}; {view.note or 'gaps'}")
    room = ROOM * limits.up
    fewer = max(desired - max(1, desired // LARGEST_SHARE), 1)
    replicas = max(fewer, math.ceil(total / room) if room else fewer)
    if replicas >= desired:
        return Proposal(
            view.role,
            desired,
            "scale_down_refused_consolidation",
            f"{what}, but one worker fewer would leave no room",
        )
    return Proposal(
        view.role, replicas, "scale_down", f"{what}, below {limits.down:g}{limits.unit}"
    )


def carried(view: RoleView) -> int:
    """Workers that what is in hand needs: as many caches as it fills, one for anything at all.

    0 where nothing is in hand. What is not seen is taken to be as busy as the rest.
    """
    if not view.seen or not view.busy:
        return 0
    if view.role == "prefill":
        return 1
    total = sum(load.kv_load for load in view.loads) * view.ready / view.seen
    return max(1, math.ceil(min(total, view.ready)))
