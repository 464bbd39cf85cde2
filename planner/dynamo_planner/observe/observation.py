"""The stage: readings in, what is known of each role out, by the rules in the README.

It remembers each worker's last reading, because a rate needs two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dynamo_planner.config.model import PlannerConfig, Role
from dynamo_planner.fleet import Fleet
from dynamo_planner.observe.reading import COUNTERS, Counters, Reading, known
from dynamo_planner.observe.traffic import Traffic

LONGEST_GAP = 12.0
"""Intervals; a longer time between two looks is a gap, over which no rate is made."""
TYPICAL_PROMPT = 512.0
"""Tokens of a waiting prompt as long as no request has told its length."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker's last reading that told something new."""

    at: float  # when it was true, by the planner's clock
    running: float
    waiting: float
    counters: Counters
    prompt: float | None = None  # mean prompt of its requests so far, tokens


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How busy one worker is."""

    worker: str
    running: float  # requests
    waiting: float  # requests
    queued_tokens: float  # prompt tokens still to be computed; estimated where not told
    kv_load: float  # share of the KV cache in use, with what waits; 1: full; may be more
    context_tokens: float | None  # longest request it takes


@dataclass(frozen=True, slots=True)
class RoleView:
    """What is known of the workers of one role."""

    role: Role
    ready: int  # workers that may get requests
    seen: int = 0  # of them, those with a reading that is fresh enough
    age_s: float = 0.0  # of the oldest such reading
    loads: tuple[WorkerLoad, ...] = ()  # of those seen, by name
    traffic: Traffic = field(default_factory=Traffic)  # since the last look
    kv_tokens: float | None = None  # KV cache of one worker, the smallest
    note: str = ""  # what was wrong with the readings, in words

    @property
    def blind(self) -> bool:
        """There are workers, and nothing is known of any."""
        return self.ready > 0 and self.seen == 0

    @property
    def whole(self) -> bool:
        """Every worker was seen."""
        return self.seen == self.ready

    @property
    def busy(self) -> bool:
        """Some worker that was seen has a request."""
        return any(load.running or load.waiting for load in self.loads)


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known at one moment."""

    at: float  # seconds of the planner's clock
    seconds: float  # since the last look; 0: the first one, or the clock jumped
    roles: tuple[RoleView, ...]
    clock_jumped: bool = False

    def of(self, role: Role) -> RoleView:
        """Raises KeyError for a role that the mode does not scale."""
        for view in self.roles:
            if view.role == role:
                return view
        raise KeyError(role)


def observe(
    before: Mapping[str, Seen],
    last: float | None,
    at: float,
    readings: Iterable[Reading],
    fleet: Fleet,
    config: PlannerConfig,
) -> tuple[Observation, dict[str, Seen]]:
    """What ``readings`` say at ``at``, and what is to be remembered instead of ``before``.

    ``last`` is the time of the last look, None before the first. Total: every reading has a
    meaning, be it that it has none.
    """
    elapsed = 0.0 if last is None else at - last
    longest = LONGEST_GAP * config.load_adjustment_interval_seconds
    jumped = last is not None and not 0 < elapsed <= longest
    if jumped:
        before, elapsed = {}, 0.0
    role_of = {component.name: component.role for component in fleet}
    by_role: dict[Role, list[Reading]] = {role: [] for role in config.roles}
    for reading in sorted(readings, key=lambda each: each.worker):
        role = role_of.get(reading.component)
        if role in by_role and reading.ready and not reading.terminating:
            by_role[role].append(reading)
    after: dict[str, Seen] = {}
    views = tuple(
        _view(role, group, before, after, at, elapsed, config) for role, group in by_role.items()
    )
    return Observation(at, elapsed, views, jumped), after


def _view(
    role: Role,
    group: list[Reading],
    before: Mapping[str, Seen],
    after: dict[str, Seen],
    at: float,
    elapsed: float,
    config: PlannerConfig,
) -> RoleView:
    loads: list[WorkerLoad] = []
    ages: list[float] = []
    caches: list[float] = []
    traffic = Traffic(seconds=elapsed, ready_seconds=elapsed * len(group))
    never = stale = 0
    for reading in group:
        seen = before.get(reading.worker)
        age = known(reading.age_s)
        running, waiting = known(reading.running), known(reading.waiting)
        if age is None or running is None or waiting is None:
            never += 1
            _keep(after, reading.worker, seen)
            continue
        if age > config.metrics_staleness_seconds:
            stale += 1
            _keep(after, reading.worker, seen)
            continue
        current = _remember(reading, at - age, running, waiting, seen)
        if seen is None or current.at <= seen.at:  # nothing new: the last scrape failed
            after[reading.worker] = seen or current
        else:
            after[reading.worker] = current
            traffic += _between(seen, current)
        load = _load(reading, current)
        loads.append(load)
        ages.append(age)
        if (size := known(reading.kv_tokens)) and size > 0:
            caches.append(size)
    notes = []
    if stale:
        notes.append(f"{stale} of {len(group)} readings are stale")
    if never:
        notes.append(f"{never} of {len(group)} workers give no figures")
    return RoleView(
        role=role,
        ready=len(group),
        seen=len(loads),
        age_s=max(ages, default=0.0),
        loads=tuple(loads),
        traffic=traffic,
        kv_tokens=min(caches, default=None),
        note="; ".join(notes),
    )


def _keep(after: dict[str, Seen], worker: str, seen: Seen | None) -> None:
    if seen is not None:
        after[worker] = seen


def _remember(
    reading: Reading, at: float, running: float, waiting: float, seen: Seen | None
) -> Seen:
    counters = reading.counters
    prompts, finished = known(counters.prompt_tokens), known(counters.finished)
    prompt = prompts / finished if prompts and finished else None
    if prompt is None and seen is not None:
        prompt = seen.prompt
    return Seen(at, running, waiting, counters, prompt)


def _between(first: Seen, second: Seen) -> Traffic:
    """What a worker did between two readings; nothing, and none of its time, if either has gaps.

    A counter that fell was reset by a restart: it has counted from zero since, as in PromQL's
    `increase`. All counters of a page go missing together, or averages would be wrong.
    """
    if not (_complete(first.counters) and _complete(second.counters)):
        return Traffic()
    grown = {
        name: _increase(getattr(first.counters, name), getattr(second.counters, name))
        for name in COUNTERS
    }
    restarted = any(
        getattr(second.counters, name) < getattr(first.counters, name) for name in COUNTERS
    )
    seconds = second.at - first.at
    return Traffic(
        worker_seconds=seconds,
        arrived=grown["first_tokens"] + second.waiting - (0.0 if restarted else first.waiting),
        running_seconds=(first.running + second.running) / 2 * seconds,
        **grown,
    )


def _complete(counters: Counters) -> bool:
    return all(known(getattr(counters, name)) is not None for name in COUNTERS)


def _increase(before: float, now: float) -> float:
    return now - before if now >= before else now


def _load(reading: Reading, seen: Seen) -> WorkerLoad:
    queued = known(reading.queued_tokens)
    if queued is None:
        queued = seen.waiting * (seen.prompt or TYPICAL_PROMPT)
    usage = known(reading.kv_usage) or 0.0
    size = known(reading.kv_tokens)
    waiting_share = 0.0
    if seen.waiting > 0:
        # What waits needs room of its own; where sizes are not known it is taken to need as much
        # as as many running requests have.
        if size:
            waiting_share = queued / size
        elif seen.running > 0:
            waiting_share = usage * seen.waiting / seen.running
    return WorkerLoad(
        worker=reading.worker,
        running=seen.running,
        waiting=seen.waiting,
        queued_tokens=queued,
        kv_load=usage + waiting_share,
        context_tokens=known(reading.context_tokens),
    )
