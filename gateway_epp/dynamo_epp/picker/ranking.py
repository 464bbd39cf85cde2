"""The decision: all that is known of request and workers, put before whoever ranks.

What decides is pure and elsewhere (``scheduling``, ``dynamo_kv_router.choice``); this is where the
pool's index, load and circuits become its arguments, and where what it remembers is told.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate, Decision, Policy, RequestSize, Rng, choose
from dynamo_kv_router.extras import block_extras

from dynamo_epp.endpoints.circuits import Circuits
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.extproc import PickRequest
from dynamo_epp.picker.reading import BYTES_PER_TOKEN
from dynamo_epp.requests import ParsedRequest, prompt_bytes
from dynamo_epp.scheduling.approximate import ApproximatePrefixes
from dynamo_epp.scheduling.ask import Ask, Prefixes, Tokens
from dynamo_epp.scheduling.candidates import candidates, overlaps
from dynamo_epp.scheduling.disagg import PREFILL, DisaggPolicy, Pairing, Split, pair
from dynamo_epp.scheduling.filters.subset import within
from dynamo_epp.scheduling.scheduler import Scheduler

DEFAULT_BLOCK_SIZE = 16


class Ranking:
    """Ranks a pool's workers by ``scheduler``'s profiles; without one ``policy`` does.
    ``can_sign``: prefill workers can be named."""

    def __init__(
        self,
        pool: Pool,
        policy: Policy,
        rng: Rng,
        *,
        circuits: Circuits | None,
        scheduler: Scheduler | None,
        disagg: DisaggPolicy,
        can_sign: bool,
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._rng = rng
        self._circuits = circuits
        self._scheduler = scheduler
        self._approximate = ApproximatePrefixes()  # for the policy; a scheduler has its own
        self._disagg = disagg
        self._can_sign = can_sign
        self.ignores_tokens = _why_blind(policy, scheduler)
        """Why no prompt need be tokenized; "" if what ranks looks at tokens."""

    def pair(
        self,
        request: PickRequest,
        parsed: ParsedRequest,
        serving: list[Worker],
        tokens: Tokens | None,
        now: float,
        turn: int,
    ) -> Pairing:
        """The workers for a request, of ``serving``, at ``now`` (monotonic seconds). ``turn``
        counts the decisions."""
        pool = self._pool
        extras = block_extras(cache_salt=parsed.cache_salt)
        sizes = [w.block_size for w in serving if w.block_size]
        block_size = min(sizes, default=DEFAULT_BLOCK_SIZE)
        if tokens is None:
            matched: dict[tuple[str, str, int], dict[int, int]] = {}
            size = RequestSize(max(1, parsed.body_bytes // BYTES_PER_TOKEN), block_size)
        else:
            chains = {w.chain(parsed.model) for w in serving}
            matched = overlaps(pool.index, chains, tokens, extras)
            size = RequestSize(len(tokens), block_size)
        if self._circuits is not None:
            self._circuits.apply(now)
        found = candidates(
            pool.workers.values(), parsed.model, matched, pool.index, now, size.blocks
        )
        if request.subset is not None:
            found = within(request.subset, found)
        scheduler, ask = self._scheduler, None
        by_cost = scheduler is None and self._policy.mode == "kv"
        guess = by_cost and tokens is not None and not all(w.tracked for w in serving)
        if scheduler is not None or guess:
            ask = Ask(
                parsed.model,
                size,
                now,
                pool.workers,
                request.head.headers,
                tokens,
                lambda: prompt_bytes(parsed, request.body or b""),
                extras,
            )

        if guess and ask is not None:
            ask.prefixes = Prefixes(ask, self._approximate)
            found = ask.prefixes.estimated_overlaps(found)

        def rank(among: Sequence[Candidate], peer: Candidate | None) -> Decision:
            if scheduler is None or ask is None:
                exact = tokens is not None
                return choose(size, among, self._policy, self._rng, turn=turn, tokens_exact=exact)
            ask.peer = None if peer is None else pool.workers[peer.name]
            profile = PREFILL if peer is not None and PREFILL in scheduler.profiles else ""
            return scheduler.decide(ask, among, self._rng, turn=turn, profile=profile)

        pairing = pair(
            found,
            rank,
            self._disagg,
            self._rng,
            splittable=parsed.splittable,
            can_sign=self._can_sign,
        )
        if ask is not None and pairing.split is not Split.REFUSED:
            self._remember(ask, pairing)
        return pairing

    def _remember(self, ask: Ask, pairing: Pairing) -> None:
        """Where the request goes, for what is decided by where others went."""
        decisions = [pairing.decode]
        if pairing.prefill is not None and pairing.prefillers:
            decisions.append(pairing.prefill)
        for decision in decisions:
            if self._scheduler is not None:
                self._scheduler.picked(ask, decision)
            elif decision.chosen is not None and ask.prefixes is not None:
                ask.prefixes.sent(decision.chosen.candidate)

    def why_approximate(self, decision: Decision) -> str:
        """Whose caches are not known exactly, and why; of three at most."""
        vague = [s.candidate.name for s in decision.ranked if not s.candidate.exact]
        problems = {
            f"{name}: {self._pool.workers[name].problem or 'cache not known in full'}"
            for name in vague[:3]
        }
        return "; ".join(sorted(problems))


def _why_blind(policy: Policy, scheduler: Scheduler | None) -> str:
    if scheduler is not None:
        return "" if scheduler.reads_prompt else "the configured plugins look at no tokens"
    return "" if policy.mode == "kv" else f"mode {policy.mode} looks at no tokens"
