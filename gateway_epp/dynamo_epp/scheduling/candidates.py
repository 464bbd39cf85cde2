"""Workers as candidates for one request: overlap from the index, load from the load view."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from dynamo_kv_router.choice import Candidate
from dynamo_kv_router.index import BlockIndex
from dynamo_kv_router.keys import block_keys, model_seed
from dynamo_kv_router.load import pickers_seen

from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.scheduling.filters.eligibility import reason_to_drop
from dynamo_epp.scheduling.ranks import ENGINES_CHOICE, best_rank

Chain = tuple[str, str, int]
"""(base model, LoRA adapter or "", tokens a block): see ``Worker.chain``."""


def overlaps(
    index: BlockIndex,
    chains: Iterable[Chain],
    tokens: npt.NDArray[np.uint32],
    extras: Sequence[bytes],
) -> dict[Chain, dict[int, int]]:
    """Chain -> slot -> leading blocks of the prompt that the slot caches."""
    return {
        chain: index.match(
            block_keys(tokens, chain[2], seed=model_seed(chain[0], chain[1]), extras=extras)
        )
        for chain in set(chains)
        if chain[2] > 0
    }


def candidates(
    workers: Collection[Worker],
    model: str,
    matched: Mapping[Chain, Mapping[int, int]],
    index: BlockIndex,
    now: float,
    blocks: int = 0,
) -> list[Candidate]:
    """One candidate for each worker, in the pool's order; those that can't be chosen say why.

    ``blocks`` of the prompt weigh in the choice of a worker's data-parallel rank.

    Of the blocks that other pickers' requests hold on a stock engine, only a picker's part counts:
    all of them read the same figures, and if each made up for the whole difference that it sees,
    together they would make up for it several times over.
    """
    pickers = 0.0  # of stock engines; 0: not looked at yet
    result = []
    held = index.blocks
    for worker in workers:
        load, endpoint = worker.load, worker.endpoint
        figures, observed_at = load.figures, load.observed_at
        requests = load.active_requests()
        sent_since = requests - load.in_hand_then
        decode_blocks = load.active_decode_blocks()
        if not load.confirms:
            pickers = pickers or pickers_seen(each.load for each in workers)
            decode_blocks -= (1.0 - 1.0 / pickers) * load.others_blocks
        depths = matched.get(worker.chain(model)) if worker.live and matched else None
        rank, overlap = ENGINES_CHOICE, depths.get(worker.slot, 0) if depths else 0
        cached = held(worker.slot)
        if worker.ranks:
            rank, overlap = best_rank(worker.ranks, depths, blocks)
            cached = sum(held(slot) for slot in worker.slots)
        result.append(
            Candidate(  # by position: by name it would take twice as long
                endpoint.name,
                worker.hostport,
                overlap,
                load.active_prefill_tokens(now),
                decode_blocks,
                requests,
                cached,
                worker.live and worker.exact,
                reason_to_drop(worker, model),
                worker.live and worker.tracked,
                1.0 if load.confirms else pickers,
                figures.waiting,
                figures.running,
                figures.cache_usage,
                math.inf if observed_at is None else now - observed_at,
                sent_since if sent_since > 0.0 else 0.0,
                endpoint.role,
                endpoint.generation,
                rank,
            )
        )
    return result
