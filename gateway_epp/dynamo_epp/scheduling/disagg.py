"""Prefill and decode picked together.

Where a graph's workers are split, a request needs two of them, and both have to be of one
generation: engines of different versions or layouts can't read each other's cache. So a generation
is chosen first, then the worker that decodes (ranked as any other pick), and then, unless that one
may as well compute the prompt itself, the workers that may prefill, best first. All of it is pure.

**Generation**: drawn with a weight for each, the number of requests it can serve at a time in units
of workers: ``workers + min(prefill, decode)``, counting those that can be chosen. While no
generation has both roles ready, decode workers alone count.

**Split or not** (Dynamo's conditional disaggregation, policy ``isl_bounding``): the decode worker
prefills by itself if ``uncached < eff_isl_threshold`` and ``uncached / prompt <
eff_isl_ratio_threshold``, where ``uncached`` are the prompt tokens that it does not cache. Off by
default, as there: then each request that can be split is.

A request that is not split where it should be is never silent: the reason is part of the result,
and with ``enforce`` the result is a refusal.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from dynamo_kv_router.choice import Candidate, Decision, Rng
from msgspec.structs import replace

PREFILL, DECODE = "prefill", "decode"
EFF_ISL_THRESHOLD = 2048
EFF_ISL_RATIO_THRESHOLD = 0.7

Rank = Callable[[Sequence[Candidate], Candidate | None], Decision]
"""Ranks those of the candidates that are not dropped: for the worker that answers, or, with that
one as the second argument, for the worker that prefills for it."""


class Split(enum.StrEnum):
    """What became of a request to a graph whose workers are split."""

    PREFILL_DECODE = "prefill-decode"
    DECODE_ONLY = "decode-only"
    REFUSED = "refused"


class Why(enum.StrEnum):
    """Why a request was not split."""

    CACHED = "cached"  # conditional disaggregation: little is left to compute
    AGGREGATED_WORKER = "aggregated-worker"  # the best worker is none of the split ones
    NOT_SPLITTABLE = "not-splittable"  # its API or its parameters can't be split
    NO_PREFILLER = "no-prefiller"  # no prefill worker of the generation can be chosen
    NO_SECRET = "no-secret"  # prefillers can't be named without a signature


DEGRADED = frozenset({Why.NO_PREFILLER, Why.NO_SECRET})
"""Reasons that are nobody's wish; with ``enforce`` such a request is refused."""


@dataclass(frozen=True, slots=True)
class DisaggPolicy:
    """When to split. Names and defaults are Dynamo's."""

    enforce: bool = False
    """`--enforce-disagg`: a request that could not be split for want of a prefill worker gets 503;
    without, its decode worker does both phases."""
    conditional: bool = False
    """`--router-conditional-disagg`: the thresholds below count."""
    eff_isl_threshold: int = EFF_ISL_THRESHOLD
    """Uncached prompt tokens from which on a request is split."""
    eff_isl_ratio_threshold: float = EFF_ISL_RATIO_THRESHOLD
    """Uncached share of the prompt from which on a request is split."""

    def __post_init__(self) -> None:
        if self.eff_isl_threshold < 0:
            raise ValueError(
                f"eff_isl_threshold is {self.eff_isl_threshold}; it must be a number of tokens ≥ 0"
            )
        if not 0 <= self.eff_isl_ratio_threshold <= 1:
            raise ValueError(
                f"eff_isl_ratio_threshold is {self.eff_isl_ratio_threshold}; it must be from 0 to 1"
            )

    @classmethod
    def read(cls, *, enforce: bool, conditional: bool, config: str) -> DisaggPolicy:
        """From command-line flags; ``config`` is `--router-conditional-disagg-config`'s JSON.

        Raises ``ValueError`` naming the key.
        """
        flag = "--router-conditional-disagg-config"
        try:
            given = msgspec.json.decode(config, type=_Thresholds) if config else _Thresholds()
        except msgspec.DecodeError as error:
            raise ValueError(f"{flag} {config!r}: {error}") from None
        if given.policy != "isl_bounding":
            raise ValueError(f"{flag}: policy {given.policy!r} is not available; use isl_bounding")
        return cls(enforce, conditional, given.eff_isl_threshold, given.eff_isl_ratio_threshold)

    def prefill_locally(self, prompt_tokens: int, cached_tokens: int) -> bool:
        """Whether the decode worker, which caches ``cached_tokens``, should compute the rest."""
        uncached = max(0, prompt_tokens - cached_tokens)
        return (
            self.conditional
            and uncached < self.eff_isl_threshold
            and uncached < self.eff_isl_ratio_threshold * max(1, prompt_tokens)
        )


class _Thresholds(msgspec.Struct, forbid_unknown_fields=True):
    policy: str = "isl_bounding"
    eff_isl_threshold: int = EFF_ISL_THRESHOLD
    eff_isl_ratio_threshold: float = EFF_ISL_RATIO_THRESHOLD


@dataclass(frozen=True, slots=True)
class Pairing:
    """Who answers, and who prefills."""

    decode: Decision
    """Who answers. Candidates of other generations and prefill workers are among its dropped."""
    prefill: Decision | None = None
    """Prefill workers of the same generation, ranked, where they were looked at."""
    split: Split | None = None
    """None: the graph's workers are not split."""
    why: Why | None = None
    """The reason, where ``split`` is not PREFILL_DECODE."""
    generation: str = ""

    @property
    def prefillers(self) -> tuple[str, ...]:
        """``ip:port`` of the prefill workers to try, best first; empty if none is to be asked."""
        if self.split is not Split.PREFILL_DECODE or self.prefill is None:
            return ()
        return self.prefill.endpoints

    def routing(self) -> str:
        """The pairing in a line: ``exact;overlap=3/5;mode=kv;disagg=decode-only(cached)``."""
        line = self.decode.routing()
        if self.split is None:
            return line
        line += f";disagg={self.split}"
        if self.why is not None:
            return f"{line}({self.why})"
        chosen = self.prefill.chosen if self.prefill is not None else None
        if chosen is None:  # refused before that
            return line
        return f"{line};prefill={chosen.candidate.overlap_blocks}/{self.decode.size.blocks}"


def weights(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Generation -> its weight, for those with at least one worker that can answer."""
    ready = Counter((c.generation, c.role) for c in candidates if not c.dropped)
    generations = sorted({generation for generation, _ in ready})
    paired = {
        name: ready[name, "worker"] + min(ready[name, PREFILL], ready[name, DECODE])
        for name in generations
    }
    if not any(paired.values()):
        paired = {name: ready[name, DECODE] for name in generations}
    return {name: weight for name, weight in paired.items() if weight}


def draw(weighted: Mapping[str, int], rng: Rng) -> str:
    """One of the names, each with its weight; "" if there is none."""
    left = rng.random() * sum(weighted.values())
    name = ""
    for name, weight in weighted.items():  # noqa: B007 - the last one, should rounding leave any
        left -= weight
        if left < 0:
            break
    return name


def pair(
    candidates: Sequence[Candidate],
    rank: Rank,
    policy: DisaggPolicy,
    rng: Rng,
    *,
    splittable: bool,
    can_sign: bool,
) -> Pairing:
    """Choose among ``candidates`` of every role and generation, and rank them with ``rank``.

    ``splittable``: the request's API and parameters allow that two workers share it. ``can_sign``:
    there is a secret, without which no decode worker would ask a prefill worker.
    """
    if not any(c.role in (PREFILL, DECODE) for c in candidates):
        return Pairing(rank(candidates, None))
    generation = draw(weights(candidates), rng)
    ready = {c.role for c in candidates if c.generation == generation and not c.dropped}
    # Where whole workers are ready and prefill workers are not, half a pair is no choice.
    whole_only = "worker" in ready and PREFILL not in ready
    decode = rank([_answering(c, generation, whole_only) for c in candidates], None)
    if decode.chosen is None:
        return Pairing(decode, None, Split.REFUSED, None, generation)
    chosen, size = decode.chosen.candidate, decode.size

    def alone(why: Why, prefill: Decision | None = None) -> Pairing:
        refused = policy.enforce and why in DEGRADED
        split = Split.REFUSED if refused else Split.DECODE_ONLY
        return Pairing(decode, prefill, split, why, generation)

    if chosen.role != DECODE:
        return alone(Why.AGGREGATED_WORKER)
    if not splittable:
        return alone(Why.NOT_SPLITTABLE)
    if policy.prefill_locally(size.prompt_tokens, chosen.overlap_blocks * size.block_size):
        return alone(Why.CACHED)
    same = [c for c in candidates if c.role == PREFILL and c.generation == generation]
    prefill = rank(same, chosen)
    if prefill.chosen is None:
        return alone(Why.NO_PREFILLER, prefill)
    if not can_sign:
        return alone(Why.NO_SECRET, prefill)
    return Pairing(decode, prefill, Split.PREFILL_DECODE, None, generation)


def _answering(candidate: Candidate, generation: str, whole_only: bool) -> Candidate:
    """The candidate for the pick of the worker that answers."""
    if candidate.dropped:
        return candidate
    if candidate.role == PREFILL:
        return replace(candidate, dropped="prefill role")
    if candidate.generation != generation:
        return replace(candidate, dropped=f"generation {generation or 'without a name'} was drawn")
    if whole_only and candidate.role == DECODE:
        return replace(candidate, dropped="no prefill worker of its generation is ready")
    return candidate
