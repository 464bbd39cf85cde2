"""Dynamo's side: its RadixTree and hashing through its Python binding, in its own venv.

Run by `python -m benchmarks.kv_index`: reads a command per line, answers each with a line of JSON.
Keys are given a chain per prompt, as Dynamo's engines do: each block has a hash of its own tokens
and one of its place in the chain; here the latter only needs to be unique.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from dynamo._core import RadixTree, compute_block_hash_for_seq
from workload import BLOCK_SIZE, OTHER_PROMPTS_PER_WORKER, Workload, make


def stored_event(number: int, first: int, parent: int | None, hashes: list[int]) -> bytes:
    blocks = [
        {"block_hash": first + i, "tokens_hash": tokens_hash}
        for i, tokens_hash in enumerate(hashes)
    ]
    data = {"stored": {"parent_hash": parent, "blocks": blocks}}
    return json.dumps({"event_id": number, "data": data}).encode()


class Anchor:
    def __init__(self, load: Workload) -> None:
        self.load = load
        self.prompt_hashes = compute_block_hash_for_seq(load.prompt, BLOCK_SIZE)
        self.stored_hashes = compute_block_hash_for_seq(load.stored, BLOCK_SIZE)
        others = [compute_block_hash_for_seq(tokens, BLOCK_SIZE) for tokens in load.other]
        self.trees = [self._tree(depths, others) for depths in load.depths]

    def _tree(self, depths: list[int], others: list[list[int]]) -> RadixTree:
        tree = RadixTree()
        number = 0
        for worker, depth in enumerate(depths):
            number += 1
            tree.apply_event(
                worker, stored_event(number, 1 << 40, None, self.prompt_hashes[:depth])
            )
        for index, hashes in enumerate(others):
            number += 1
            event = stored_event(number, (2 << 40) + (index << 20), None, hashes)
            tree.apply_event(index // OTHER_PROMPTS_PER_WORKER, event)
        return tree

    def answer(self, case: int) -> list[list[int]]:
        scores = self.trees[case].find_matches(self.prompt_hashes).scores
        return sorted([worker, depth] for (worker, _rank), depth in scores.items())

    def miss(self) -> list[list[int]]:
        return sorted(self.trees[0].find_matches(self.stored_hashes[:512]).scores.items())

    def keys(self, repeat: int) -> float:
        return timed(lambda: compute_block_hash_for_seq(self.load.prompt, BLOCK_SIZE), repeat)

    def match(self, case: int, repeat: int) -> float:
        return timed(lambda: self.trees[case].find_matches(self.prompt_hashes).scores, repeat)

    def store(self, event_blocks: int) -> float:
        """Seconds per block, for events of so many blocks."""
        events = list(self._events(event_blocks))
        tree = RadixTree()
        gc.collect()
        start = time.process_time()
        for event in events:
            tree.apply_event(0, event)
        return (time.process_time() - start) / len(self.stored_hashes)

    def _events(self, event_blocks: int) -> Iterator[bytes]:
        """Chains of 512 blocks, in pieces."""
        hashes = self.stored_hashes
        for number, at in enumerate(range(0, len(hashes), event_blocks)):
            parent = None if at % 512 == 0 else at
            yield stored_event(number, at + 1, parent, hashes[at : at + event_blocks])


def timed(call: Callable[[], object], repeat: int) -> float:
    """Seconds per call."""
    start = time.process_time()
    for _ in range(repeat):
        call()
    return (time.process_time() - start) / repeat


def main() -> None:
    anchor = Anchor(make())
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(anchor, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
