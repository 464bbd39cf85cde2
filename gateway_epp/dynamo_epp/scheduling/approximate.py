"""What engines that tell nothing probably cache: the prompts that were sent to them.

For each engine the keys of the last blocks that were sent to it are kept, least recently used
first to go, as many as its cache holds. It is a guess: engines evict by their own rules, forget
everything when they restart, and get requests from other pickers. Where tokens are not known, four
bytes of the prompt stand for one.
Source: llm-d's approx-prefix-cache-producer, whose parameters and defaults these are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from dynamo_crds.schema import Bool, Count, Positive
from dynamo_kv_router.index import BlockIndex
from dynamo_kv_router.keys import block_keys, model_seed

from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.scheduling.parameters import Parameters

LEAST_BLOCK_TOKENS = 64
"""Smaller blocks cost more than they find."""
FORGET_ABOVE = 2
"""Engines are forgotten when there are so many times more of them than candidates."""


class ApproximateParameters(Parameters):
    auto_tune: Bool = True
    """Take an engine's capacity from what it says of its cache, where it does."""
    block_size_tokens: Count = 16
    """At least 64 are used."""
    max_prefix_tokens_to_match: Count = 131_072
    """Tokens of a prompt that are looked at."""
    max_prefix_blocks_to_match: Count = 2048
    """Used where the limit in tokens is 0."""
    lru_capacity_per_server: Positive = 31_250
    """Blocks kept of an engine that does not tell its cache's size."""


class ApproximatePrefixes:
    """Keys of what was sent to whom. Engines are known by their address."""

    def __init__(self, parameters: ApproximateParameters | None = None) -> None:
        self._parameters = parameters or ApproximateParameters()
        self.block_tokens = max(LEAST_BLOCK_TOKENS, self._parameters.block_size_tokens)
        self._index = BlockIndex()
        self._slots: dict[str, int] = {}  # engine -> its slot in the index
        self._sent: dict[int, OrderedDict[int, None]] = {}  # slot -> keys, the oldest first
        self._free: list[int] = []

    def keys(
        self, model: str, prompt: npt.NDArray[np.uint32] | bytes, extras: Sequence[bytes] = ()
    ) -> npt.NDArray[np.uint64]:
        """Keys of the prompt's full blocks, tokens or bytes; ``extras`` as in ``block_keys``."""
        parameters = self._parameters
        limit = parameters.max_prefix_tokens_to_match
        if not limit:
            limit = parameters.max_prefix_blocks_to_match * self.block_tokens
        if isinstance(prompt, bytes):
            prompt = np.frombuffer(prompt[: min(len(prompt) & ~3, 4 * limit)], dtype="<u4")
        seed = model_seed(model, "")
        return block_keys(prompt[:limit], self.block_tokens, seed=seed, extras=extras)

    def match(self, keys: npt.NDArray[np.uint64]) -> dict[str, int]:
        """Engine -> leading blocks that were sent to it."""
        found = self._index.match(keys)
        return {engine: found[slot] for engine, slot in self._slots.items() if slot in found}

    def record(self, worker: Worker, keys: npt.NDArray[np.uint64]) -> None:
        """A prompt goes to ``worker``."""
        slot = self._slot(worker.hostport)
        sent, new = self._sent[slot], keys.tolist()
        for key in reversed(new):  # a prefix outlives what follows it, as in engines
            sent[key] = None
            sent.move_to_end(key)
        self._index.store(slot, keys)
        excess = len(sent) - self._capacity(worker)
        if excess > 0:
            self._index.remove(slot, [sent.popitem(last=False)[0] for _ in range(excess)])

    def keep(self, workers: Mapping[str, Worker]) -> None:
        """Forget engines that are gone. Cheap while there are few of them."""
        if len(self._slots) <= FORGET_ABOVE * max(8, len(workers)):
            return
        here = {worker.hostport for worker in workers.values()}
        for engine in self._slots.keys() - here:
            slot = self._slots.pop(engine)
            del self._sent[slot]
            self._index.clear(slot)
            self._free.append(slot)

    def _slot(self, engine: str) -> int:
        slot = self._slots.get(engine)
        if slot is None:
            slot = self._free.pop() if self._free else len(self._slots)
            self._slots[engine] = slot
            self._sent[slot] = OrderedDict()
        return slot

    def _capacity(self, worker: Worker) -> int:
        blocks = worker.total_blocks * worker.block_size // self.block_tokens
        if self._parameters.auto_tune and blocks > 0:
            return blocks
        return self._parameters.lru_capacity_per_server
