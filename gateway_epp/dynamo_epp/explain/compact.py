"""A decision in a few hundred bytes, so that thousands can be kept.

A decision holds one object or two for each worker. Thousands of decisions over a hundred workers
would be hundreds of thousands of objects, which the garbage collector walks again and again while
requests wait. Here the candidates are one string of bytes, unpacked when somebody asks; of many
only those are kept that say something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec
from dynamo_kv_router.choice import Candidate, Decision, Scored

WHOLE = 32
"""Up to so many candidates nothing is left out."""
RANKED = 24
"""Of more: the best of those that could have been chosen…"""
DROPPED = 8
"""…and some of those that could not, each reason at least once while there is room."""
RANKED_LOWER = "ranked lower"
"""The reason in ``Kept.left_out`` of those that could have been chosen."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[tuple[Scored, ...], tuple[Candidate, ...]]).decode


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A decision, packed. What is asked for often needs no unpacking."""

    shell: Decision  # all but its candidates
    chosen: Scored | None
    left_out: Mapping[str, int]
    """Reason -> candidates that were left out with it. Empty unless there were many."""
    packed: bytes

    @classmethod
    def of(cls, decision: Decision) -> Kept:
        ranked, dropped = decision.ranked, decision.dropped
        left_out: Mapping[str, int] = {}
        if len(ranked) + len(dropped) > WHOLE:
            ranked, dropped = _telling(ranked), _diverse(dropped)
            left_out = Counter(candidate.dropped for candidate in decision.dropped)
            left_out.subtract(candidate.dropped for candidate in dropped)
            left_out[RANKED_LOWER] = len(decision.ranked) - len(ranked)
            left_out = {reason: count for reason, count in left_out.items() if count}
        return cls(
            shell=replace(decision, ranked=(), dropped=()),
            chosen=decision.chosen,
            left_out=left_out,
            packed=_encode((ranked, dropped)),
        )

    def unpack(self) -> Decision:
        """The decision, without the candidates that were left out."""
        ranked, dropped = _decode(self.packed)
        return replace(self.shell, ranked=ranked, dropped=dropped)


def _telling(ranked: tuple[Scored, ...]) -> tuple[Scored, ...]:
    """The best, and whoever has the least prefill: the terms of all others are relative to it."""
    if len(ranked) <= RANKED:
        return ranked
    least = min(ranked, key=lambda scored: scored.candidate.active_prefill_tokens)
    best = ranked[:RANKED]
    return best if least in best else (*best[:-1], least)


def _diverse(dropped: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """The first of each reason, then the first ones."""
    firsts = {candidate.dropped: candidate for candidate in reversed(dropped)}
    others = (candidate for candidate in dropped if firsts[candidate.dropped] is not candidate)
    return (*firsts.values(), *others)[:DROPPED]
