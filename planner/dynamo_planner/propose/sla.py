"""Target sla: the predictive loop's number, and the reactive loop's check by estimate.

Source of the reactive rule: Dynamo 1.6, up if every engine's estimate is over a target, down if
each is below ``load_scaling_down_sensitivity`` of it, one at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynamo_planner.config.model import PlannerConfig
from dynamo_planner.observe import RoleView, WorkerLoad
from dynamo_planner.performance import Capacity, Chosen, Model, capacity
from dynamo_planner.predict import Prediction
from dynamo_planner.propose.proposal import Proposal


def propose_by_prediction(
    view: RoleView,
    desired: int,
    prediction: Prediction | None,
    chosen: Chosen | None,
    config: PlannerConfig,
) -> tuple[Proposal, Capacity | None]:
    """``ceil(foreseen requests / what one replica can take)``, moved in bounded steps.

    Without traffic to go by or a model to reckon with it stays at ``desired``, and says so.
    """
    role = view.role
    if prediction is None:
        why = "no interval has been seen well enough"
        return Proposal(role, desired, "no_traffic_data", why), None
    if chosen is None:
        why = "no profile, no roofline, and too few observations to learn from"
        return Proposal(role, desired, "model_not_ready", why), None
    one = capacity(
        role,
        chosen.model,
        isl=prediction.isl,
        osl=prediction.osl,
        computed=prediction.computed,
        kv_tokens=view.kv_tokens,
        config=config,
    )
    needed = max(1, math.ceil(prediction.rate / one.rps - 1e-9))
    step = config.max_throughput_scaling_replicas
    replicas = min(max(needed, desired - step), desired + step)
    reason = (
        f"{prediction.rate:.3g} requests/s of {prediction.isl:.0f} + {prediction.osl:.0f} tokens "
        f"are foreseen ({prediction.by}), a replica takes {one.rps:.3g}/s by {chosen}"
    )
    if not one.reachable:
        reason += "; the targets can't be held with any number of replicas"
    state = "set_lower_bound" if config.reactive else "scale"
    return Proposal(role, replicas, state, reason), one


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the next request would meet at one worker; None: not this role's."""

    ttft_s: float | None
    itl_s: float | None

    def share(self, config: PlannerConfig) -> float:
        """The worse of the two against its target; 1: just held."""
        shares = [0.0]
        if self.ttft_s is not None:
            shares.append(1000 * self.ttft_s / config.ttft_ms)
        if self.itl_s is not None:
            shares.append(1000 * self.itl_s / config.itl_ms)
        return max(shares)


def estimate(
    load: WorkerLoad, view: RoleView, model: Model, prompt: float, context: float, more: float = 1.0
) -> Estimate:
    """For one more prompt of ``prompt`` tokens behind all that waits, among sequences of
    ``context`` tokens. ``more``: as if the worker had so many times what it has."""
    batch = more * (load.running + load.waiting)
    first = model.prefill_s(more * load.queued_tokens + prompt)
    step = model.step_s(max(1.0, batch), context)
    match view.role:
        case "prefill":
            return Estimate(first, None)
        case "decode":
            return Estimate(None, step)
    return Estimate(first + step, step)


def propose_by_estimate(
    view: RoleView,
    desired: int,
    chosen: Chosen | None,
    prompt: float,
    context: float,
    config: PlannerConfig,
) -> tuple[Proposal, tuple[Estimate, ...]]:
    """The reactive check. Monotone in the load of every worker."""
    role = view.role
    if not view.seen:
        why = "no worker is ready" if not view.ready else "no worker gives figures"
        return Proposal(role, desired, "no_fpm_data", why), ()
    if chosen is None:
        return Proposal(role, desired, "insufficient_data", "there is no model to estimate by"), ()
    found = tuple(estimate(load, view, chosen.model, prompt, context) for load in view.loads)
    shares = [each.share(config) for each in found]
    low, high = f"{100 * min(shares):.0f}%", f"{100 * max(shares):.0f}%"
    span = high if low == high else f"{low} to {high}"
    what = f"the next request is estimated at {span} of its targets by {chosen}"
    if min(shares) > 1 and view.busy:
        return Proposal(role, desired + 1, "scale_up", what), found
    below = config.load_scaling_down_sensitivity / 100
    idle = not view.busy and below > 0
    if (max(shares) >= below and not idle) or desired <= 1:
        return Proposal(role, desired, "no_change", what), found
    if not view.whole:
        return Proposal(role, desired, "insufficient_data", f"{what}; {view.note}"), found
    if idle:
        return Proposal(role, desired - 1, "scale_down", "no worker has a request"), found
    more = desired / (desired - 1)
    crowded = (
        estimate(load, view, chosen.model, prompt, context, more).share(config)
        for load in view.loads
    )
    if max(crowded) >= below:
        why = f"{what}, but one worker fewer would leave no room"
        return Proposal(role, desired, "scale_down_refused_consolidation", why), found
    return Proposal(role, desired - 1, "scale_down", what), found
