"""Which data-parallel rank of an engine gets a request, where its ranks are behind one port.

Each rank has a cache of its own, and vLLM takes the header `x-data-parallel-rank`. So the engine's
own balancing is overruled where the prompt is cached by some rank, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynamo_epp.endpoints.worker import Rank

ENGINES_CHOICE = -1


def best_rank(
    ranks: Sequence[Rank], depths: Mapping[int, int] | None, blocks: int
) -> tuple[int, int]:
    """(number of the rank, its leading cached blocks) for a prompt of ``blocks``.

    ``depths``: slot -> leading blocks. The cheapest by ``blocks − cached + blocks · requests in
    hand``: a request that runs already weighs as much as computing this prompt anew, since nothing
    is known of its size. (``ENGINES_CHOICE``, 0) if no rank caches any of it.
    """
    cached = {rank.number: depths.get(rank.slot, 0) for rank in ranks} if depths else {}
    if not any(cached.values()):
        return ENGINES_CHOICE, 0

    def cost(rank: Rank) -> tuple[int, int]:
        return max(0, blocks - cached[rank.number]) + blocks * rank.requests, rank.number

    number = min(ranks, key=cost).number
    return number, cached[number]
