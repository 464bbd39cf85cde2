"""The index against a model of dicts and sets."""

from __future__ import annotations

import random

import numpy as np
import pytest
from dynamo_kv_router import index as index_module
from dynamo_kv_router.index import BlockIndex
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

# Few keys, so that they meet often; some share a place in the cache, and 0 is one of them.
_INVERSE = pow(0x9E3779B97F4A7C15, -1, 2**64)
CROWDED = [_INVERSE * (n << 3) % 2**64 for n in range(6)]
KEYS = [*CROWDED, *range(1, 10), 2**64 - 1, 2**63]
WORKERS = [0, 1, 5, 63, 64, 130]

keys_lists = st.lists(st.sampled_from(KEYS), max_size=12)
workers = st.sampled_from(WORKERS)


class SetModel:
    def __init__(self) -> None:
        self.held: dict[int, set[int]] = {worker: set() for worker in WORKERS}

    def match(self, keys: list[int]) -> dict[int, int]:
        found = {}
        for worker, held in self.held.items():
            depth = 0
            while depth < len(keys) and keys[depth] in held:
                depth += 1
            if depth:
                found[worker] = depth
        return found


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex()
        self.model = SetModel()

    @rule(worker=workers, keys=keys_lists, as_array=st.booleans())
    def store(self, worker, keys, as_array):
        self.index.store(worker, np.array(keys, dtype=np.uint64) if as_array else keys)
        self.model.held[worker].update(keys)

    @rule(worker=workers, keys=keys_lists, as_array=st.booleans())
    def remove(self, worker, keys, as_array):
        self.index.remove(worker, np.array(keys, dtype=np.uint64) if as_array else keys)
        self.model.held[worker].difference_update(keys)

    @rule(worker=workers)
    def clear(self, worker):
        self.index.clear(worker)
        self.model.held[worker].clear()

    @rule(keys=keys_lists)
    def match(self, keys):
        assert self.index.match(keys) == self.model.match(keys)

    @rule()
    def compact(self):
        for worker, mine in self.index._mine.items():
            self.index._compact(worker, mine)

    @invariant()
    def same_world(self):
        for worker, held in self.model.held.items():
            assert self.index.blocks(worker) == len(held)
        for key in KEYS:
            holders = {worker: 1 for worker, held in self.model.held.items() if key in held}
            assert self.index.match([key]) == holders
        assert len(self.index) == len(set().union(*self.model.held.values()))


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("max_changes", [1 << 16, 100])
def test_large_random_history(max_changes, monkeypatch):
    """Cache collisions, compaction and churn at a size where they happen by themselves."""
    monkeypatch.setattr(index_module._MaskCache, "_MAX_CHANGES", max_changes)
    monkeypatch.setattr(index_module, "_LOG_SLACK", 16)
    rng = random.Random(7)
    chains = [[rng.getrandbits(64) for _ in range(300)] for _ in range(40)]
    index, model = BlockIndex(), SetModel()
    for _ in range(600):
        worker = rng.choice(WORKERS)
        chain = rng.choice(chains)
        a, b = sorted((rng.randrange(301), rng.randrange(301)))
        action = rng.random()
        if action < 0.6:
            index.store(worker, chain[a:b])
            model.held[worker].update(chain[a:b])
        elif action < 0.97:
            index.remove(worker, chain[a:b])
            model.held[worker].difference_update(chain[a:b])
        else:
            index.clear(worker)
            model.held[worker].clear()
        assert index.blocks(worker) == len(model.held[worker])
        for wanted in (chain, chain[:a] + chains[0]):
            assert index.match(wanted) == model.match(wanted)
    assert len(index) == len(set().union(*model.held.values()))
    for worker in WORKERS:
        index.clear(worker)
        assert index.blocks(worker) == 0
    assert len(index) == 0
    assert all(index.match(chain) == {} for chain in chains)


def test_clear_touches_only_what_the_worker_held():
    """Churn does not make a worker's log grow without bound."""
    index = BlockIndex()
    for turn in range(200):
        keys = np.arange(turn * 1_000, turn * 1_000 + 1_000, dtype=np.uint64)
        index.store(3, keys)
        index.remove(3, keys[1:])
    assert index.blocks(3) == 200
    assert index._mine[3].logged <= 2 * 200 + index_module._LOG_SLACK + 1_000


def test_the_caller_may_reuse_its_array():
    index = BlockIndex()
    keys = np.arange(10, dtype=np.uint64)
    index.store(0, keys)
    keys += 100
    index.clear(0)
    assert index.match(np.arange(10, dtype=np.uint64)) == {}
    assert len(index) == 0
