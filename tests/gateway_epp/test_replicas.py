"""Several pickers at once: how evenly requests in hand are spread, against one picker alone.

A simulation in virtual time: 2,000 requests of many sizes over 16 workers. What a picker sees is
what it would see: its own bookings, and of the others' requests what workers confirm (ours, within
milliseconds) or what engines' figures tell once a second (stock).
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean

import pytest
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.scheduling.candidates import candidates
from dynamo_kv_router.choice import Policy, RequestSize, choose
from dynamo_kv_router.engine_metrics import EngineFigures
from dynamo_kv_router.index import BlockIndex
from dynamo_kv_router.load import OTHERS_SHARE, WorkerLoad
from dynamo_runtime.endpoint import Endpoint

WORKERS, REQUESTS = 16, 2000
BLOCK = 16
RATE = 100.0  # requests a second
CONFIRMED_S, SCRAPE_S = 0.005, 1.0
PREFILL_TOKENS_PER_S, DECODE_S = 10_000.0, 1.5
SETTLED = 200  # requests until the pool has its usual load


@dataclass
class Simulation:
    """``spread`` of each seed: mean over time of max / mean of the workers' requests in hand."""

    pickers: int
    confirms: bool
    policy: Policy = field(default_factory=Policy)
    believes_all: bool = False  # figures of stock engines count in full, as in Dynamo's #589

    def spread(self, seed: int) -> float:
        rng, numbers = random.Random(seed), itertools.count()
        views = [[self._worker(n) for n in range(WORKERS)] for _ in range(self.pickers)]
        rngs = [random.Random(100 * seed + picker) for picker in range(self.pickers)]
        running, held = [0] * WORKERS, [0] * WORKERS
        events: list[tuple[float, int, Callable[[float], None]]] = []
        spreads: list[float] = []
        index = BlockIndex()

        def at(when: float, what: Callable[[float], None]) -> None:
            heapq.heappush(events, (when, next(numbers), what))

        def arrival(
            number: int, picker: int, tokens: int, decode_s: float
        ) -> Callable[[float], None]:
            def arrive(now: float) -> None:
                view = views[picker]
                seen = candidates(view, "m", {}, index, now)
                decision = choose(RequestSize(tokens, BLOCK), seen, self.policy, rngs[picker])
                assert decision.chosen is not None
                chosen = int(decision.chosen.candidate.name)
                key = f"{picker}-{number}"
                view[chosen].load.book(key, tokens, 0, now)
                running[chosen] += 1
                held[chosen] += -(-tokens // BLOCK)
                prefilled = now + CONFIRMED_S + tokens / PREFILL_TOKENS_PER_S
                if self.confirms:
                    at(now + CONFIRMED_S, lambda then: tell_accepted(chosen, key, tokens, then))
                    at(prefilled, lambda _: tell_first_token(chosen, key))
                at(prefilled + decode_s, lambda _: end(picker, chosen, key, tokens))
                if number >= SETTLED:
                    spreads.append(max(running) / mean(running))

            return arrive

        def tell_accepted(worker: int, key: str, tokens: int, now: float) -> None:
            for view in views:
                view[worker].load.accept(key, tokens, 0, now)

        def tell_first_token(worker: int, key: str) -> None:
            for view in views:
                view[worker].load.first_token(key)

        def end(picker: int, worker: int, key: str, tokens: int) -> None:
            running[worker] -= 1
            held[worker] -= -(-tokens // BLOCK)
            views[picker][worker].load.release(key)
            if self.confirms:
                for view in views:
                    view[worker].load.finish(key)

        def scrape(now: float) -> None:
            for view in views:
                for worker, load in enumerate(each.load for each in view):
                    load.observe(EngineFigures(running[worker], 0, 0.0, 0.0), held[worker], 0, now)
                    if self.believes_all:
                        load.others_blocks = round(load.others_blocks / OTHERS_SHARE)
            if now < REQUESTS / RATE:
                at(now + SCRAPE_S, scrape)

        when = 0.0
        for number in range(REQUESTS):
            when += rng.expovariate(RATE)
            tokens = int(min(8192, max(32, rng.lognormvariate(6.0, 1.0))))
            picker, decode_s = rng.randrange(self.pickers), rng.expovariate(1 / DECODE_S)
            at(when, arrival(number, picker, tokens, decode_s))
        if not self.confirms:
            at(0.0, scrape)
        while events:
            now, _, what = heapq.heappop(events)
            what(now)
        return mean(spreads)

    def _worker(self, number: int) -> Worker:
        endpoint = Endpoint(str(number), f"10.0.0.{number + 1}", 8000, ready=True)
        load = WorkerLoad(block_size=BLOCK, confirms=self.confirms, pickers=self.pickers)
        worker = Worker(endpoint, number, load)
        worker.models, worker.block_size, worker.live = frozenset({"m"}), BLOCK, True
        return worker


def spread(**settings: object) -> float:
    return mean(Simulation(**settings).spread(seed) for seed in (1, 2))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one() -> float:
    """What one picker alone achieves."""
    return spread(pickers=1, confirms=True)


def test_three_pickers_spread_confirmed_load_as_evenly_as_one(one: float) -> None:
    assert spread(pickers=3, confirms=True) <= 1.05 * one


def test_three_pickers_spread_the_load_of_stock_engines_nearly_as_evenly(one: float) -> None:
    assert spread(pickers=3, confirms=False) <= 1.15 * one


def test_pickers_that_believe_stale_figures_herd(one: float) -> None:
    """Dynamo's issue #589: each takes the cheapest by figures that all of them read at once."""
    cheapest = Policy(unconfirmed_spread=0.0)
    herding = spread(pickers=3, confirms=False, policy=cheapest, believes_all=True)
    assert herding > 1.12 * one
    assert spread(pickers=3, confirms=False) < herding
