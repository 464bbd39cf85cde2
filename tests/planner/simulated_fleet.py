"""A graph's workers in virtual time: enough of an engine to close the loop around a planner.

Requests arrive at a rate that a function of time gives; each worker computes prompts one after the
other and one token of every running request a step, by a timing profile. Pods take a while to
start, and finish what they have when they are taken away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from dynamo_planner.config import PlannerConfig
from dynamo_planner.config.model import Role
from dynamo_planner.decision import Decision
from dynamo_planner.execute import Applied
from dynamo_planner.fleet import Component
from dynamo_planner.observe import Counters, Reading
from dynamo_planner.performance import Profiles
from dynamo_planner.record import Head, Look, head_line, look_line
from dynamo_planner.state import Inputs, State
from dynamo_planner.step import step
from dynamo_runtime.timing_profile import TimingProfile

TICK_S = 0.5
PROFILE = TimingProfile()


@dataclass(slots=True)
class Request:
    arrived: float
    isl: int
    osl: int
    done: float = 0.0  # tokens of the answer

    @property
    def tokens(self) -> float:
        return self.isl + self.done


@dataclass(slots=True)
class Worker:
    """One pod."""

    name: str
    ready_at: float
    kv_tokens: float
    terminating: bool = False
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    counters: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(Counters.__dataclass_fields__, 0.0)
    )

    @property
    def used(self) -> float:
        return sum(each.tokens for each in self.running)

    @property
    def in_hand(self) -> int:
        return len(self.waiting) + len(self.running)

    def advance(self, now: float, seconds: float, ttfts: list[float]) -> None:
        """What happens until ``now + seconds``."""
        c, left = self.counters, seconds
        while self.waiting and left > 0:
            first = self.waiting[0]
            if self.used + first.isl + first.osl > self.kv_tokens and self.running:
                break
            took = PROFILE.prefill_seconds(first.isl)
            left -= took
            self.running.append(self.waiting.pop(0))
            waited = max(took, now + seconds - left - first.arrived)
            ttfts.append(waited)
            c["first_tokens"] += 1
            c["ttft_seconds"] += waited
            first.done = 1.0
            c["prefill_seconds"] += took
            c["prefill_tokens"] += first.isl
        if self.running and left > 0:
            one = PROFILE.decode_step_seconds(len(self.running))
            tokens = left / one
            for each in self.running:
                made = min(tokens, each.osl - each.done)
                each.done += made
                c["itl_tokens"] += made
                c["itl_seconds"] += made * one * seconds / left
        for each in [r for r in self.running if r.done >= r.osl]:
            self.running.remove(each)
            c["finished"] += 1
            c["finished_seconds"] += now + seconds - each.arrived
            c["prompt_tokens"] += each.isl
            c["output_tokens"] += each.osl


@dataclass
class Loop:
    """A planner, its fleet and its traffic; ``run`` lets time pass."""

    config: PlannerConfig
    rate: Callable[[float], float]  # requests a second at a time
    replicas: int = 1
    isl: int = 1_000
    osl: int = 150
    start_s: float = 30.0
    kv_tokens: float = 60_000.0
    role: Role = "worker"
    profiles: Profiles = field(default_factory=Profiles)
    spoil: Callable[[float, Reading], Reading] = lambda now, reading: reading
    now: float = 0.0
    workers: list[Worker] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    recording: list[bytes] = field(default_factory=list)
    failed: int = 0  # requests that met no worker at all

    def __post_init__(self) -> None:
        self.state = State.begin(self.profiles)
        self.desired = self.replicas
        self.applied: tuple[Applied, ...] = ()
        self._made = 0
        self._due = 0.0
        self._owed = 0.0
        self._held: list[Request] = []
        self.recording.append(head_line(Head.of(self.config, self.state)))
        self._scale(0.0)

    # --- the fleet

    def _scale(self, start_s: float) -> None:
        alive = [w for w in self.workers if not w.terminating]
        for _ in range(self.desired - len(alive)):
            self._made += 1
            self.workers.append(Worker(f"w{self._made:04}", self.now + start_s, self.kv_tokens))
        for worker in alive[self.desired :]:
            worker.terminating = True
        self.workers = [w for w in self.workers if not w.terminating or w.in_hand]

    @property
    def ready(self) -> list[Worker]:
        return [w for w in self.workers if not w.terminating and w.ready_at <= self.now]

    def component(self) -> Component:
        return Component(
            "Worker",
            self.role,
            self.desired,
            ready=len(self.ready),
            terminating=sum(w.terminating for w in self.workers),
        )

    def readings(self) -> tuple[Reading, ...]:
        return tuple(
            self.spoil(
                self.now,
                Reading(
                    w.name,
                    "Worker",
                    ready=w.ready_at <= self.now,
                    terminating=w.terminating,
                    age_s=0.0,
                    running=len(w.running),
                    waiting=len(w.waiting),
                    kv_usage=min(1.0, w.used / w.kv_tokens),
                    kv_tokens=w.kv_tokens,
                    queued_tokens=float(sum(r.isl for r in w.waiting)),
                    context_tokens=8_192,
                    counters=Counters(**w.counters),
                ),
            )
            for w in self.workers
        )

    def _arrive(self) -> None:
        self._owed += self.rate(self.now) * TICK_S
        while self._owed >= 1:
            self._owed -= 1
            self._held.append(Request(self.now, self.isl, self.osl))
        while self._held and self.ready:
            least = min(self.ready, key=lambda w: (w.in_hand, w.name))
            least.waiting.append(self._held.pop(0))

    # --- the planner

    def look(self) -> Decision:
        """One look of the planner, recorded, its orders carried out."""
        inputs = Inputs(self.now, (self.component(),), self.readings(), self.applied)
        self.state, decision = step(self.state, inputs, self.config)
        self.recording.append(look_line(Look(inputs, decision)))
        self.decisions.append(decision)
        self.applied = tuple(Applied(o.component, o.replicas) for o in decision.orders)
        for order in decision.orders:
            self.desired = order.replicas
            self._scale(self.start_s)
        return decision

    def run(self, seconds: float) -> list[int]:
        """Let time pass; the number of replicas asked for at each look."""
        asked, end = [], self.now + seconds
        while self.now < end:
            if self.now >= self._due:
                self.look()
                self._due = self.now + self.config.load_adjustment_interval_seconds
                asked.append(self.desired)
            self._arrive()
            for worker in self.workers:
                if worker.ready_at <= self.now:
                    worker.advance(self.now, TICK_S, self.ttfts)
            self.now += TICK_S
            self._scale(self.start_s)
        return asked


def reversals(asked: list[int]) -> int:
    """How often the direction changed from up to down or back."""
    moves = [b - a for a, b in pairwise(asked) if b != a]
    return sum(1 for a, b in pairwise(moves) if (a > 0) != (b > 0))
