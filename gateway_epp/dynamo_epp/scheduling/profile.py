"""A scheduling profile: filters drop, scorers add up, a picker orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kv_router.choice import Candidate, Decision, How, Policy, Rng, Scored
from msgspec.structs import replace

from dynamo_epp.scheduling.approximate import ApproximatePrefixes
from dynamo_epp.scheduling.ask import Ask, Prefixes
from dynamo_epp.scheduling.plugin import Filter, Picker, Scorer

_NO_POLICY = Policy()


@dataclass(frozen=True, slots=True)
class Profile:
    """Names are those of the plugins in the configuration."""

    name: str
    filters: tuple[tuple[str, Filter], ...]
    scorers: tuple[tuple[str, float, Scorer], ...]  # name, weight
    picker: Picker

    def decide(
        self,
        ask: Ask,
        candidates: Sequence[Candidate],
        approximate: ApproximatePrefixes,
        rng: Rng,
        *,
        turn: int = 0,
    ) -> Decision:
        """Rank the candidates that nobody has dropped yet.

        The score of a candidate is the sum over the scorers of weight × score, each score clamped
        to [0, 1]; the raw ones are kept in the decision. It is ``load-only`` if no scorer looked at
        what is cached, and ``exact`` only if all that was looked at is known exactly.
        """
        prefixes = ask.prefixes = Prefixes(ask, approximate)
        ask.profile = self.name
        eligible = [candidate for candidate in candidates if not candidate.dropped]
        dropped = [candidate for candidate in candidates if candidate.dropped]
        pool = len(eligible)
        for name, rule in self.filters:
            if not eligible:
                break
            reasons = rule.reasons(ask, eligible)
            dropped += [
                replace(candidate, dropped=f"{name}: {reason}")
                for candidate, reason in zip(eligible, reasons, strict=True)
                if reason
            ]
            eligible = [c for c, reason in zip(eligible, reasons, strict=True) if not reason]
        ranked = self._rank(ask, eligible, rng, turn) if eligible else ()
        if not prefixes.asked:
            how = How.LOAD_ONLY
        elif prefixes.estimated or not all(candidate.exact for candidate in eligible):
            how = How.APPROXIMATE
        else:
            how = How.EXACT
        return Decision(
            ask.size,
            _NO_POLICY,
            how,
            ranked,
            tuple(dropped),
            profile=self.name,
            scorers=tuple((name, weight) for name, weight, _ in self.scorers),
            filtered=pool - len(eligible),
            limit=self.picker.limit,
        )

    def _rank(self, ask: Ask, eligible: list[Candidate], rng: Rng, turn: int) -> tuple[Scored, ...]:
        raw = [scorer.scores(ask, eligible) for _, _, scorer in self.scorers]
        totals = [0.0] * len(eligible)
        for (_, weight, _), scores in zip(self.scorers, raw, strict=True):
            for at, score in enumerate(scores):
                totals[at] += weight * (0.0 if score < 0.0 else 1.0 if score > 1.0 else score)
        by_candidate = list(zip(*raw, strict=True)) or [()] * len(eligible)
        return tuple(
            Scored(eligible[at], -totals[at], by_candidate[at])
            for at in self.picker.order(eligible, totals, rng, turn)
        )
