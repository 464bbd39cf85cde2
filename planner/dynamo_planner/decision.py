"""What was decided at one look, with everything that led to it: plain data for log and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_planner.config.model import Role
from dynamo_planner.execute import Order
from dynamo_planner.predict import Prediction


@dataclass(frozen=True, slots=True)
class Observed:
    """A role since the last look. None: there was nothing to make a mean of."""

    ready: int  # workers
    seen: int  # of them, those whose figures are known
    age_s: float  # of the oldest such figures
    coverage: float  # share of the workers' time that was seen
    rps: float | None  # requests a second; None: too little was seen
    ttft_s: float | None = None
    itl_s: float | None = None
    request_s: float | None = None
    isl: float | None = None
    osl: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class RoleDecision:
    """One role."""

    role: Role
    desired: int  # replicas before
    replicas: int  # and after
    reason: str
    held: bool  # nothing was weighed
    clamped: bool  # another number was right, but not for long enough
    load_state: str  # of the reactive loop; a state of `dynamo_planner_load_scaling_decision`
    throughput_state: str  # of the predictive one; of `dynamo_planner_throughput_scaling_decision`
    observed: Observed
    throughput_reason: str = ""  # of the predictive loop's last word
    scaled_by_others: str = ""  # who was found to have set another number
    prediction: Prediction | None = None
    capacity_rps: float | None = None  # of one replica
    estimated_ttft_s: float | None = None  # at the busiest worker
    estimated_itl_s: float | None = None
    model: str = ""  # which performance model was used; "" for none
    model_error: float | None = None  # its mean relative error over the last hour


@dataclass(frozen=True, slots=True)
class Decision:
    """One look."""

    at: float  # seconds of the planner's clock
    roles: tuple[RoleDecision, ...]
    orders: tuple[Order, ...]
    gpu_hours: float  # used since the planner began
    limits: tuple[str, ...] = ()  # which limit changed what, a sentence each
    notes: tuple[str, ...] = ()  # what was odd, a sentence each
    missing: tuple[Role, ...] = ()  # roles that the mode scales and the graph has no component for
    advisory: bool = False

    @property
    def blind(self) -> bool:
        """Some role has workers of which nothing is known."""
        return any(each.observed.ready and not each.observed.seen for each in self.roles)
