"""Several pickers at once, in virtual time: how evenly they spread what is in hand.

2,000 requests of many sizes over 16 workers. What a picker sees is what it would see: its own
bookings, and of the others' requests what workers confirm (ours, within milliseconds) or what
engines' figures tell at times (stock). `python -m benchmarks.replicas` writes a table of it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from statistics import mean

import msgspec
from dynamo_epp.endpoints.stock import FIGURES_S
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.scheduling.candidates import candidates
from dynamo_kv_router.choice import Candidate, Policy, RequestSize, choose
from dynamo_kv_router.engine_metrics import EngineFigures
from dynamo_kv_router.index import BlockIndex
from dynamo_kv_router.load import WorkerLoad
from dynamo_runtime.endpoint import Endpoint

BLOCK = 16  # tokens
CONFIRMED_S = 0.005
PREFILL_TOKENS_PER_S, DECODE_S = 10_000.0, 1.5
SETTLED = 200  # requests until the pool has its usual load
PREFIX_BLOCKS, PREFIXES_CACHED = 60, 8  # where prompts share them: each, and on each worker


@dataclass(frozen=True, slots=True)
class Seen:
    """Spreads are max / mean over the workers, averaged over the arrivals: 1 is even."""

    requests: float  # in hand
    blocks: float  # held by them, and those of their prompts that are still to compute
    hits: float  # share of the prompt tokens that were cached


@dataclass(frozen=True)
class Simulation:
    pickers: int
    confirms: bool  # our workers; else stock engines
    policy: Policy = field(default_factory=Policy)
    believes_all: bool = False
    """Stale figures count in full and the cheapest is taken, as though there were one picker."""
    prefixes: int = 0  # that prompts share; 0: each prompt is new
    workers: int = 16
    requests: int = 2000
    rate: float = 100.0  # requests a second

    def seen(self, *seeds: int) -> Seen:
        """The mean over ``seeds``."""
        runs = [_Run(self, seed).run() for seed in seeds]
        return Seen(*(mean(getattr(run, each.name) for run in runs) for each in fields(Seen)))


class _Run:
    def __init__(self, simulation: Simulation, seed: int) -> None:
        self._of = simulation
        workers, pickers = range(simulation.workers), range(simulation.pickers)
        self._rng = random.Random(seed)
        self._rngs = [random.Random(100 * seed + picker) for picker in pickers]
        self._views = [[_worker(n, simulation) for n in workers] for _ in pickers]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._index = BlockIndex()
        # What is true of each worker:
        self._running = [0 for _ in workers]
        self._held = [0 for _ in workers]  # blocks
        self._to_compute: list[dict[str, int]] = [{} for _ in workers]  # request -> tokens
        self._busy_until = [0.0 for _ in workers]  # prompts are computed one after the other
        self._cached: list[OrderedDict[int, None]] = [OrderedDict() for _ in workers]  # prefixes

        self._requests: list[float] = []
        self._blocks: list[float] = []
        self._hits, self._tokens = 0, 0

    def run(self) -> Seen:
        of, rng, when = self._of, self._rng, 0.0
        for number in range(of.requests):
            when += rng.expovariate(of.rate)
            tokens = int(min(8192, max(32, rng.lognormvariate(6.0, 1.0))))
            picker, decode_s = rng.randrange(of.pickers), rng.expovariate(1 / DECODE_S)
            prefix = -1
            if of.prefixes:
                prefix = rng.randrange(of.prefixes)
                tokens = PREFIX_BLOCKS * BLOCK + tokens // 4
            self._at(when, self._arrival(number, picker, tokens, decode_s, prefix))
        if not of.confirms:
            self._at(0.0, self._scrape)
        self._last = when
        while self._events:
            now, _, what = heapq.heappop(self._events)
            what(now)
        return Seen(mean(self._requests), mean(self._blocks), self._hits / self._tokens)

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def _arrival(
        self, number: int, picker: int, tokens: int, decode_s: float, prefix: int
    ) -> Callable[[float], None]:
        key, blocks = f"{picker}-{number}", -(-tokens // BLOCK)

        def arrive(now: float) -> None:
            worker = self._pick(picker, tokens, prefix, now)
            load = self._views[picker][worker].load
            cached = self._cache(worker, prefix) * BLOCK
            self._hits += cached
            self._tokens += tokens
            load.book(key, tokens, cached, now)
            self._running[worker] += 1
            self._held[worker] += blocks
            self._to_compute[worker][key] = tokens - cached
            begins = max(now + CONFIRMED_S, self._busy_until[worker])
            computed = begins + (tokens - cached) / PREFILL_TOKENS_PER_S
            self._busy_until[worker] = computed
            if self._of.confirms:
                self._at(now + CONFIRMED_S, lambda then: accepted(worker, cached, then))
            self._at(computed, lambda _: first_token(worker))
            self._at(computed + decode_s, lambda _: end(worker))
            if number >= SETTLED:
                self._look()

        def accepted(worker: int, cached: int, now: float) -> None:
            for view in self._views:
                view[worker].load.accept(key, tokens, cached, now)

        def first_token(worker: int) -> None:
            del self._to_compute[worker][key]
            for view in self._views:
                view[worker].load.first_token(key)

        def end(worker: int) -> None:
            self._running[worker] -= 1
            self._held[worker] -= blocks
            self._views[picker][worker].load.release(key)
            for view in self._views:
                view[worker].load.finish(key)

        return arrive

    def _pick(self, picker: int, tokens: int, prefix: int, now: float) -> int:
        view = self._views[picker]
        matched = {
            ("m", "", BLOCK): {
                worker: PREFIX_BLOCKS
                for worker, prefixes in enumerate(self._cached)
                if prefix in prefixes
            }
        }
        found = candidates(view, "m", matched, self._index, now)
        if self._of.believes_all:
            found = [_believed(seen, worker) for seen, worker in zip(found, view, strict=True)]
        size = RequestSize(tokens, BLOCK)
        chosen = choose(size, found, self._of.policy, self._rngs[picker]).chosen
        assert chosen is not None
        return int(chosen.candidate.name)

    def _cache(self, worker: int, prefix: int) -> int:
        """The worker has the prefix from now on; blocks of it that it had already."""
        if prefix < 0:
            return 0
        prefixes = self._cached[worker]
        hit = prefix in prefixes
        prefixes[prefix] = None
        prefixes.move_to_end(prefix)
        if len(prefixes) > PREFIXES_CACHED:
            prefixes.popitem(last=False)
        return PREFIX_BLOCKS if hit else 0

    def _scrape(self, now: float) -> None:
        for view in self._views:
            for number, worker in enumerate(view):
                figures = EngineFigures(self._running[number], 0, 0.0, 0.0)
                worker.load.observe(figures, self._held[number], 0, now)
        if now < self._last:
            self._at(now + FIGURES_S, self._scrape)

    def _look(self) -> None:
        blocks = [
            held + sum(tokens.values()) / BLOCK
            for held, tokens in zip(self._held, self._to_compute, strict=True)
        ]
        self._requests.append(max(self._running) / mean(self._running))
        self._blocks.append(max(blocks) / mean(blocks))


def _worker(number: int, of: Simulation) -> Worker:
    endpoint = Endpoint(str(number), f"10.0.0.{number + 1}", 8000, ready=True)
    load = WorkerLoad(block_size=BLOCK, confirms=of.confirms, pickers=of.pickers)
    worker = Worker(endpoint, number, load)
    worker.model, worker.models, worker.block_size = "m", frozenset({"m"}), BLOCK
    worker.live = True
    return worker


def _believed(seen: Candidate, worker: Worker) -> Candidate:
    blocks = worker.load.active_decode_blocks()
    return msgspec.structs.replace(seen, active_decode_blocks=blocks, pickers=1.0)
