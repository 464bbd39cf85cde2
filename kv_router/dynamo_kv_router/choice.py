"""Which worker gets the request, and why.

The cost function is Dynamo's, so that what people learned about tuning it stays true. The rest of
the module exists for the *why*: a decision keeps every candidate with its overlap, load, cost and
the reason it was passed over, so that each answer can be explained afterwards. Everything here is
pure: randomness comes in as an argument, and no clock is read.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from dynamo_kv_router.load import STALE_S

SEVERAL_PICKERS = 1.5
"""Figures are late and never add up exactly: from here on there is more than one picker."""


class Rng(Protocol):
    """What ``choose`` needs of ``random.Random``."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...


class How(enum.StrEnum):
    """How a decision came about; never left unsaid."""

    EXACT = "exact"  # the engine's own tokens, and every candidate's cache known exactly
    APPROXIMATE = "approximate"  # some candidate's cache is known only in part
    LOAD_ONLY = "load-only"  # no tokens, or no cache known: load alone decided


@dataclass(frozen=True, slots=True)
class RequestSize:
    """What the choice needs to know of a request."""

    prompt_tokens: int
    block_size: int  # tokens a block

    @property
    def blocks(self) -> int:
        """Blocks that the prompt fills, the last one perhaps in part."""
        return -(-self.prompt_tokens // self.block_size)


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """One worker as the picker sees it at the moment of the choice."""

    name: str  # pod
    endpoint: str  # ip:port
    overlap_blocks: int = 0  # leading blocks of the prompt in the worker's device cache
    active_prefill_tokens: float = 0.0  # uncached prompt tokens accepted and not yet computed
    active_decode_blocks: float = 0.0  # blocks held by running requests
    active_requests: float = 0.0
    cached_blocks: int = 0  # blocks in the worker's cache, for ties
    exact: bool = True  # the cache is known exactly
    dropped: str = ""  # why it can't be chosen; "" if it can
    tracked: bool = True  # the index follows the cache at all
    pickers: float = 1.0  # that send to it unseen by each other; 1 too if it tells of all requests
    waiting: int = 0  # requests in the engine's queue, as it told
    running: int = 0  # requests in its batch
    kv_usage: float = 0.0  # share of its cache in use, 0..1
    figures_age: float = math.inf  # seconds since those three were true; infinite: never told
    sent_since: float = 0.0  # requests in hand beyond those of that time
    role: str = "worker"  # "worker", "prefill" or "decode"
    generation: str = ""  # worker hash; prefill and decode pair within one only
    rank: int = -1  # data-parallel rank that would get it; -1: the engine chooses, or has one

    @property
    def figures_known(self) -> bool:
        """Whether waiting, running and kv_usage may be believed."""
        return self.figures_age <= STALE_S


@dataclass(frozen=True, slots=True)
class Policy:
    """How to choose. Names and defaults are Dynamo's (`--router-…`).

    ``mode`` is a key of ``MODES``. The parameters below it matter for ``kv`` only.
    """

    mode: str = "kv"
    overlap_score_credit: float = 1.0
    """Blocks of prefill that one overlapping block saves."""
    overlap_score_credit_decay: float = 0.0
    """Lowers the credit of workers that have more prefill queued than the least busy one."""
    prefill_load_scale: float = 1.0
    """Weight of prefill work against decode blocks."""
    decode_active_request_weight: float = 0.0
    """Cost in blocks of each active request."""
    temperature: float = 0.0
    """0 takes the cheapest; above, a softmax over costs scaled to [0, 1]."""
    unconfirmed_spread: float = 0.5
    """Where load is not confirmed (stock engines), several pickers that read the same figures would
    all take the cheapest: workers that cost at most this share of the prompt's blocks more, and
    cache as much of it, count as good too, and the cheaper of two drawn from the best quarter is
    taken. 0: the cheapest is."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(
                f"routing mode {self.mode!r} is unknown; use one of {', '.join(MODES)}"
            )
        for name in (
            "overlap_score_credit",
            "overlap_score_credit_decay",
            "prefill_load_scale",
            "decode_active_request_weight",
            "temperature",
            "unconfirmed_spread",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be a number ≥ 0")


class Scored(msgspec.Struct, frozen=True, array_like=True):
    """A candidate with its cost in blocks; lower wins.

    A decision by scorers has no cost: there ``cost`` is the weighted sum of ``scores``, negated.
    """

    candidate: Candidate
    cost: float
    scores: tuple[float, ...] = ()  # in [0, 1], in the order of ``Decision.scorers``


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer and its reasons.

    ``ranked`` holds the eligible candidates, best first (the first is the pick, the others are the
    fallback order); ``dropped`` holds the rest, each with the reason in ``Candidate.dropped``.
    Scorers of a profile leave their names and weights in ``scorers``.
    """

    size: RequestSize
    policy: Policy
    how: How
    ranked: tuple[Scored, ...]
    dropped: tuple[Candidate, ...]
    profile: str = ""  # the scheduling profile that decided; "" for the policy's mode
    scorers: tuple[tuple[str, float], ...] = ()  # (name, weight)
    filtered: int = 0  # of ``dropped``: eligible, but dropped by the profile's filters
    limit: int = 0  # endpoints that may be named; 0: as many as whoever asks wants

    @property
    def mode(self) -> str:
        return "profile" if self.profile else self.policy.mode

    @property
    def chosen(self) -> Scored | None:
        return self.ranked[0] if self.ranked else None

    @property
    def endpoints(self) -> tuple[str, ...]:
        """``ip:port``, best first."""
        return tuple(scored.candidate.endpoint for scored in self.ranked)

    def terms(self, scored: Scored) -> dict[str, float]:
        """The parts of a candidate's cost by name; they add up to it. Empty outside mode kv.

        With a profile: each scorer's weight times its score; they add up to the cost, negated.
        """
        if self.profile:
            parts = zip(self.scorers, scored.scores, strict=True)
            return {name: weight * score for (name, weight), score in parts}
        if self.mode != "kv":
            return {}
        least_prefill = min(s.candidate.active_prefill_tokens for s in self.ranked)
        return {
            name: term(self.size, scored.candidate, least_prefill, self.policy)
            for name, term in KV_TERMS.items()
        }

    def routing(self) -> str:
        """The decision in a line: ``exact;overlap=3/5;mode=kv``."""
        chosen = self.chosen
        overlap = chosen.candidate.overlap_blocks if chosen else 0
        return f"{self.how};overlap={overlap}/{self.size.blocks};mode={self.mode}"


# A term of the kv cost: (request, candidate, least active prefill among the eligible, policy) ->
# cost in blocks. Each is told by name in ``Decision.terms``.
Term = Callable[[RequestSize, Candidate, float, Policy], float]


def prefill_term(
    size: RequestSize, candidate: Candidate, least_prefill: float, policy: Policy
) -> float:
    """Prefill work in blocks, less what the cache saves.

    ``scale · max(0, (active_prefill_tokens + isl) / block_size − credit · overlap)``, where
    ``credit = overlap_score_credit / (1 + decay · excess)`` and ``excess = (active_prefill −
    least active_prefill) / isl``. Source: Dynamo's KV router, cost function of 1.x.
    """
    excess = 0.0
    if size.prompt_tokens > 0:
        excess = (candidate.active_prefill_tokens - least_prefill) / size.prompt_tokens
    credit = policy.overlap_score_credit / (1.0 + policy.overlap_score_credit_decay * excess)
    work = (candidate.active_prefill_tokens + size.prompt_tokens) / size.block_size
    work -= credit * candidate.overlap_blocks
    return policy.prefill_load_scale * work if work > 0.0 else 0.0


def decode_term(size: RequestSize, candidate: Candidate, _: float, __: Policy) -> float:
    """Blocks held once this request runs as well."""
    return candidate.active_decode_blocks + size.blocks


def requests_term(_: RequestSize, candidate: Candidate, __: float, policy: Policy) -> float:
    """``decode_active_request_weight`` for each active request."""
    return policy.decode_active_request_weight * candidate.active_requests


KV_TERMS: Mapping[str, Term] = {
    "prefill": prefill_term,
    "decode": decode_term,
    "requests": requests_term,
}


def kv_costs(size: RequestSize, eligible: Sequence[Candidate], policy: Policy) -> list[float]:
    """The cost of each candidate (at least one): the sum of its terms."""
    least_prefill = min(candidate.active_prefill_tokens for candidate in eligible)
    terms = tuple(KV_TERMS.values())
    return [
        sum([term(size, candidate, least_prefill, policy) for term in terms])
        for candidate in eligible
    ]


def _rank_kv(
    size: RequestSize, eligible: Sequence[Candidate], policy: Policy, rng: Rng, _: int
) -> list[Scored]:
    scored = list(map(Scored, eligible, kv_costs(size, eligible, policy)))
    if policy.temperature > 0:
        return _softmax_order(scored, policy.temperature, rng)
    ranked = _by_cost(scored, rng)
    if policy.unconfirmed_spread > 0 and ranked[0].candidate.pickers >= SEVERAL_PICKERS:
        _spread(ranked, policy.unconfirmed_spread * size.blocks, rng)
    return ranked


def _by_cost(scored: Sequence[Scored], rng: Rng) -> list[Scored]:
    # Equal costs: the worker with fewer requests, then the one with the emptier cache (its blocks
    # are the cheapest to give up), then chance, so that no worker is preferred by its name.
    return sorted(
        scored,
        key=lambda s: (
            s.cost,
            s.candidate.active_requests,
            s.candidate.cached_blocks,
            rng.random(),
        ),
    )


def _spread(ranked: list[Scored], slack: float, rng: Rng) -> None:
    """Power of two choices among the best: the cheaper of two drawn comes first, in place.

    The best are the cheapest quarter of the candidates, at least two, without those that cost more
    than ``slack`` blocks above the cheapest, or cache less of the prompt: a prefix is not computed
    anew for the sake of the spread. Source: Mitzenmacher 2001, and for a random subset against
    stale figures the same author's "How useful is old information?" (2000).
    """
    limit, overlap = ranked[0].cost + slack, ranked[0].candidate.overlap_blocks
    best = [
        place
        for place, scored in enumerate(ranked[: max(2, len(ranked) // 4)])
        if scored.cost <= limit and scored.candidate.overlap_blocks >= overlap
    ]
    drawn = min(best[int(rng.random() * len(best))], best[int(rng.random() * len(best))])
    if drawn:
        ranked.insert(0, ranked.pop(drawn))


def _softmax_order(scored: Sequence[Scored], temperature: float, rng: Rng) -> list[Scored]:
    """An order drawn without replacement with weights ``exp(−cost' / temperature)``.

    ``cost'`` is the cost scaled to [0, 1] over the candidates. Adding Gumbel noise to the log
    weights and sorting draws exactly that (Yellott 1977), so the fallback list follows the same
    law as the pick.
    """
    lowest = min(s.cost for s in scored)
    spread = max(s.cost for s in scored) - lowest

    def key(s: Scored) -> float:
        scaled = (s.cost - lowest) / spread if spread > 0 else 0.0
        gumbel = -math.log(-math.log(max(rng.random(), 5e-324)))
        return scaled / temperature - gumbel

    return sorted(scored, key=key)


def _requests_in_flight(candidate: Candidate) -> tuple[float, float]:
    return (candidate.active_requests, candidate.active_prefill_tokens)


def _unscored(candidates: Sequence[Candidate]) -> list[Scored]:
    return [Scored(candidate, candidate.active_requests) for candidate in candidates]


def _shuffled(eligible: Sequence[Candidate], rng: Rng) -> list[Candidate]:
    return [
        candidate
        for _, candidate in sorted(
            ((rng.random(), candidate) for candidate in eligible), key=lambda pair: pair[0]
        )
    ]


def _rank_least_loaded(
    _: RequestSize, eligible: Sequence[Candidate], __: Policy, rng: Rng, ___: int
) -> list[Scored]:
    return _unscored(sorted(_shuffled(eligible, rng), key=_requests_in_flight))


def _rank_power_of_two(
    _: RequestSize, eligible: Sequence[Candidate], __: Policy, rng: Rng, ___: int
) -> list[Scored]:
    shuffled = _shuffled(eligible, rng)
    return _unscored(sorted(shuffled[:2], key=_requests_in_flight) + shuffled[2:])


def _rank_random(
    _: RequestSize, eligible: Sequence[Candidate], __: Policy, rng: Rng, ___: int
) -> list[Scored]:
    return _unscored(_shuffled(eligible, rng))


def _rank_round_robin(
    _: RequestSize, eligible: Sequence[Candidate], __: Policy, ___: Rng, turn: int
) -> list[Scored]:
    ordered = sorted(eligible, key=lambda candidate: candidate.name)
    start = turn % len(ordered)
    return _unscored(ordered[start:] + ordered[:start])


# mode -> (request, eligible candidates (at least one), policy, rng, turn) -> best first
MODES: Mapping[
    str, Callable[[RequestSize, Sequence[Candidate], Policy, Rng, int], list[Scored]]
] = {
    "kv": _rank_kv,
    "round-robin": _rank_round_robin,
    "random": _rank_random,
    "least-loaded": _rank_least_loaded,
    "power-of-two": _rank_power_of_two,
}


def choose(
    size: RequestSize,
    candidates: Sequence[Candidate],
    policy: Policy,
    rng: Rng,
    *,
    turn: int = 0,
    tokens_exact: bool = True,
) -> Decision:
    """Rank ``candidates`` for a request.

    ``turn`` is the number of the choice, for round-robin. ``tokens_exact`` says whether the
    overlaps were computed from the engine's own tokens; without them, or in a mode that looks at
    load alone, the decision is ``load-only``. With tokens it is ``exact`` if the cache of every
    eligible candidate is, else ``approximate``.
    """
    eligible = [candidate for candidate in candidates if not candidate.dropped]
    dropped = tuple(candidate for candidate in candidates if candidate.dropped)
    ranked = MODES[policy.mode](size, eligible, policy, rng, turn) if eligible else []
    if policy.mode != "kv" or not tokens_exact:
        how = How.LOAD_ONLY
    elif all(candidate.exact for candidate in eligible):
        how = How.EXACT
    else:
        how = How.APPROXIMATE
    return Decision(size, policy, how, tuple(ranked), dropped)
