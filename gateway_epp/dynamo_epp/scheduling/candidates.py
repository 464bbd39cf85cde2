"""Workers as candidates for one request: overlap from the index, load from the load view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from dynamo_kv_router.choice import Candidate
from dynamo_kv_router.index import BlockIndex
from dynamo_kv_router.keys import block_keys, model_seed

from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.scheduling.filters import reason_to_drop

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
    workers: Iterable[Worker],
    model: str,
    matched: Mapping[Chain, Mapping[int, int]],
    index: BlockIndex,
    now: float,
) -> list[Candidate]:
    """One candidate for each worker, in the pool's order; those that can't be chosen say why."""
    result = []
    for worker in workers:
        load = worker.load
        overlap = matched.get(worker.chain(model), {}).get(worker.slot, 0) if worker.live else 0
        result.append(
            Candidate(
                name=worker.endpoint.name,
                endpoint=worker.hostport,
                overlap_blocks=overlap,
                active_prefill_tokens=load.active_prefill_tokens(now),
                active_decode_blocks=load.active_decode_blocks(),
                active_requests=load.active_requests(),
                cached_blocks=index.blocks(worker.slot),
                exact=worker.live and worker.exact,
                dropped=reason_to_drop(worker, model),
            )
        )
    return result
