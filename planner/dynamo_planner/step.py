"""One look: the stages in their order, as one pure function of state and inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynamo_planner.config.model import PlannerConfig
from dynamo_planner.constrain import constrain
from dynamo_planner.decision import Decision, Observed, RoleDecision
from dynamo_planner.execute import orders, others, remembered
from dynamo_planner.fleet import Fleet, desired, of_role
from dynamo_planner.observe import Observation, RoleView, Traffic, observe
from dynamo_planner.performance import Capacity, Chosen, choose_model, point
from dynamo_planner.performance.live import REMEMBERED_S
from dynamo_planner.predict import MOST, Prediction, Sample, predict
from dynamo_planner.propose import (
    Estimate,
    Proposal,
    propose_by_estimate,
    propose_by_load,
    propose_by_prediction,
)
from dynamo_planner.propose.load import carried
from dynamo_planner.reconcile import Verdict, reconcile
from dynamo_planner.state import Inputs, RoleState, State

TYPICAL_PROMPT, TYPICAL_CONTEXT = 512.0, 640.0
"""Tokens, as long as no request has told its lengths."""


def step(state: State, inputs: Inputs, config: PlannerConfig) -> tuple[State, Decision]:
    """What to do now, and what to remember."""
    fleet = scaled(inputs.fleet, config)
    observation, seen = observe(state.seen, state.at, inputs.at, inputs.readings, fleet, config)
    expected = remembered(state.ordered, inputs.applied, fleet)
    # Who only advises expects others to scale.
    foreign = {} if config.advisory else others(expected, fleet)
    began = inputs.at if state.predicted_at is None else state.predicted_at
    if observation.clock_jumped:
        began = inputs.at
    due = config.predictive and inputs.at - began >= config.throughput_adjustment_interval_seconds
    thoughts = {
        view.role: _think(
            state.roles.get(view.role, RoleState()),
            view,
            observation,
            of_role(fleet, view.role),
            state,
            foreign.get(view.role, ""),
            config,
            due=due,
        )
        for view in observation.roles
        if of_role(fleet, view.role)
    }
    allocation = constrain(
        {role: each.verdict.replicas for role, each in thoughts.items()},
        {role: carried(each.view) for role, each in thoughts.items()},
        [role for role, each in thoughts.items() if each.verdict.held],
        fleet,
        config,
    )
    reasons = {role: each.verdict.reason for role, each in thoughts.items()}
    gpu_seconds = state.gpu_seconds + observation.seconds * sum(
        each.gpus * (max(each.desired, each.ready) + each.terminating) for each in fleet
    )
    notes = []
    if observation.clock_jumped:
        notes.append("the clock jumped: rates and waits begin anew")
    notes += [
        f"order for {each.component} failed: {each.problem}"
        for each in inputs.applied
        if each.problem
    ]
    decision = Decision(
        at=inputs.at,
        roles=tuple(
            each.decision(sum(allocation.replicas[c.name] for c in of_role(fleet, role)), config)
            for role, each in thoughts.items()
        ),
        orders=orders(allocation, fleet, reasons, advisory=config.advisory),
        gpu_hours=gpu_seconds / 3600,
        limits=allocation.notes,
        notes=tuple(notes),
        missing=tuple(role for role in config.roles if not of_role(fleet, role)),
        advisory=config.advisory,
    )
    after = replace(
        state,
        at=inputs.at,
        predicted_at=inputs.at if due else began,
        seen=seen,
        ordered={each.name: each.desired for each in fleet},
        roles={**state.roles, **{role: each.state for role, each in thoughts.items()}},
        gpu_seconds=gpu_seconds,
    )
    return after, decision


def scaled(fleet: Fleet, config: PlannerConfig) -> Fleet:
    """What of ``fleet`` this planner scales, by name, with the GPUs that the configuration says."""
    return tuple(
        replace(each, gpus=config.gpus(each.role) or each.gpus)
        for each in sorted(fleet, key=lambda each: each.name)
        if each.role in config.roles
    )


@dataclass(frozen=True, slots=True)
class _Thought:
    """All about one role at one look."""

    view: RoleView
    desired: int
    verdict: Verdict
    state: RoleState
    prediction: Prediction | None
    capacity: Capacity | None
    estimates: tuple[Estimate, ...]
    chosen: Chosen | None
    scaled_by_others: str

    def decision(self, replicas: int, config: PlannerConfig) -> RoleDecision:
        view, traffic, verdict = self.view, self.view.traffic, self.verdict
        predicted = self.state.predicted
        first = [each.ttft_s for each in self.estimates if each.ttft_s is not None]
        gaps = [each.itl_s for each in self.estimates if each.itl_s is not None]
        return RoleDecision(
            role=view.role,
            desired=self.desired,
            replicas=replicas,
            reason=verdict.reason,
            held=verdict.held,
            clamped=verdict.clamped,
            load_state=verdict.state if config.reactive else "disabled",
            throughput_state=(predicted.state if predicted is not None else "unset")
            if config.predictive
            else "disabled",
            observed=Observed(
                ready=view.ready,
                seen=view.seen,
                age_s=view.age_s,
                coverage=traffic.coverage,
                rps=traffic.rate(config.min_coverage),
                ttft_s=traffic.ttft_s,
                itl_s=traffic.itl_s,
                request_s=traffic.request_s,
                isl=traffic.isl,
                osl=traffic.osl,
                note=view.note,
            ),
            throughput_reason=predicted.reason if predicted is not None else "",
            scaled_by_others=self.scaled_by_others,
            prediction=self.prediction,
            capacity_rps=self.capacity.rps if self.capacity else None,
            estimated_ttft_s=max(first, default=None),
            estimated_itl_s=max(gaps, default=None),
            model=self.chosen.model.name if self.chosen else "",
            model_error=self.chosen.error if self.chosen else None,
        )


def _think(
    before: RoleState,
    view: RoleView,
    observation: Observation,
    components: Fleet,
    state: State,
    foreign: str,
    config: PlannerConfig,
    *,
    due: bool,
) -> _Thought:
    """Predict, propose and reconcile for one role."""
    at, now = observation.at, desired(components)
    window = Traffic() if observation.clock_jumped else before.window + view.traffic
    history, points = before.history, before.points
    prompt, context = _lengths(history, window)
    chosen: Chosen | None = None
    if config.optimization_target == "sla":
        learned = point(at, view)
        points = tuple(p for p in points if 0 <= at - p.at <= REMEMBERED_S)
        points += (learned,) if learned is not None else ()
        profile = state.profiles.of(view.role)
        chosen = choose_model(view.role, profile, points, context, config)
    prediction, one, predictive = None, None, None
    if due:
        sample = Sample.of(window, config.min_coverage)
        if sample is not None:
            history = (*history, sample)[-MOST:]
            prediction = predict(history, config)
        predictive, one = propose_by_prediction(view, now, prediction, chosen, config)
        window = Traffic()
    estimates: tuple[Estimate, ...] = ()
    reactive: Proposal | None = None
    if config.optimization_target != "sla":
        reactive = propose_by_load(view, now, config)
    elif config.enable_load_scaling:
        reactive, estimates = propose_by_estimate(view, now, chosen, prompt, context, config)
    usable = predictive if predictive and predictive.state in ("set_lower_bound", "scale") else None
    verdict, memory = reconcile(
        before.memory,
        at,
        view,
        components,
        reactive,
        usable,
        config,
        clock_jumped=observation.clock_jumped,
        scaled_by_others=foreign,
    )
    after = RoleState(memory, window, history, points, predictive or before.predicted)
    return _Thought(view, now, verdict, after, prediction, one, estimates, chosen, foreign)


def _lengths(history: tuple[Sample, ...], window: Traffic) -> tuple[float, float]:
    """Mean prompt that is computed, and mean tokens of a sequence half-way through its answer."""
    now = Sample(0.0, window.isl, window.osl, window.computed)
    known = next((s for s in (now, *reversed(history)) if s.isl is not None), None)
    if known is None or known.isl is None:
        return TYPICAL_PROMPT, TYPICAL_CONTEXT
    prompt = known.isl if known.computed is None else known.computed
    return prompt, known.isl + (known.osl or 0.0) / 2
