"""Why one worker was picked and why each of the others was not, in a sentence each."""

from __future__ import annotations

from dynamo_kv_router.choice import Decision, Scored

EQUAL = 1e-9
"""Costs that differ by less are one cost, summed up in another order."""


def why(decision: Decision) -> list[str]:
    """One sentence for each of ``decision.ranked``."""
    if not decision.ranked:
        return []
    best, *others = decision.ranked
    return [_picked(decision, best), *(_not_picked(decision, best, other) for other in others)]


def _picked(decision: Decision, best: Scored) -> str:
    if len(decision.ranked) == 1:
        return "the only one that could be chosen"
    terms = decision.terms(best)
    if not terms:
        return f"first by {decision.mode}"
    beaten = min(scored.cost for scored in decision.ranked) < best.cost - EQUAL
    if decision.profile:
        rank, total = "drawn" if beaten else "highest", f"score {-best.cost:.4g}"
    else:
        drawn = f"drawn at temperature {decision.policy.temperature:g}"
        rank, total = drawn if beaten else "lowest", f"cost {best.cost:.4g} blocks"
    parts = " + ".join(f"{name} {value:.4g}" for name, value in terms.items() if value)
    return f"{rank}: {total} = {parts}" if parts else f"{rank}: {total}"


def _not_picked(decision: Decision, best: Scored, other: Scored) -> str:
    terms, mine = decision.terms(other), decision.terms(best)
    if not terms:
        return f"ranked lower by {decision.mode}"
    worse = other.cost - best.cost
    less, more = ("higher", "lower") if decision.profile else ("blocks cheaper", "blocks more")
    if worse < -EQUAL:
        return f"{-worse:.4g} {less}, but not drawn"
    if worse <= EQUAL:
        return "the same score" if decision.profile else f"the same cost; {_tie(best, other)}"
    parts = [
        f"{name} {value - mine[name]:+.4g}"
        for name, value in terms.items()
        if abs(value - mine[name]) > EQUAL
    ]
    return f"{worse:.4g} {more}: {', '.join(parts)}"


def _tie(best: Scored, other: Scored) -> str:
    ours, theirs = best.candidate, other.candidate
    if theirs.active_requests > ours.active_requests:
        return "more requests in hand"
    if theirs.cached_blocks > ours.cached_blocks:
        return "a fuller cache"
    return "chance decided"
