"""A decision in sentences: who got the request, why, why the next best did not, what came after."""

from __future__ import annotations

from collections import Counter
from typing import Any

Json = dict[str, Any]


def sentences(decision: Json) -> list[str]:
    """The story of one request, as `/debug/decisions` tells it in full."""
    if decision["how"] == "refused":
        return [_refused(decision)]
    ranked = [c for c in decision["candidates"] if not c["dropped"]]
    dropped = Counter(c["dropped"] for c in decision["candidates"] if c["dropped"])
    left_out = Counter(decision.get("left_out") or {})
    lower = left_out.pop("ranked lower", 0)
    dropped.update(left_out)
    told = [_picked(decision, ranked[0]) if ranked else "Nobody could be chosen."]
    if len(ranked) > 1:
        told.append(_next(ranked[1], len(ranked) - 2 + lower))
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        told.append(f"Could not be chosen: {reasons}.")
    told.append(_how(decision))
    if disagg := decision.get("disagg"):
        told.append(_disagg(disagg))
    if ranked or decision["outcome"]:
        told.append(_after(decision))
    if cached := _cached(decision):
        told.append(cached)
    return told


def _refused(decision: Json) -> str:
    status = decision["outcome"].get("status", "an error")
    return f"Refused with {status} before there was anything to choose: {decision['reason']}"


def _load(candidate: Json) -> str:
    return (
        f"{candidate['active_requests']:g} requests and "
        f"{candidate['active_prefill_tokens']:g} prefill tokens in hand"
    )


def _picked(decision: Json, best: Json) -> str:
    overlap = f"cached {best['overlap_blocks']} of the prompt's {decision['blocks']} blocks and "
    if decision["prompt_tokens"] < 0:
        overlap = ""
    why = best.get("why") or "it ranked first"
    return f"{best['name']} ({best['endpoint']}) got it: {why}. It {overlap}had {_load(best)}."


def _next(second: Json, others: int) -> str:
    why = second.get("why") or "it ranked lower"
    rest = f" {others} others ranked lower still." if others > 0 else ""
    cached = f"{second['overlap_blocks']} blocks cached, {_load(second)}"
    return f"{second['name']} came next: {why} ({cached}).{rest}"


def _how(decision: Json) -> str:
    mode = f"mode {decision['mode']}"
    if profile := decision.get("profile"):
        mode = f"profile {profile}"
    why = f", because: {decision['reason']}" if decision["reason"] else ""
    return f"The decision is {decision['how']} ({mode}){why}."


def _disagg(disagg: Json) -> str:
    prefillers = ", ".join(disagg.get("prefillers") or ())
    where = f" at {prefillers}" if prefillers else ""
    why = f" ({disagg['reason']})" if disagg.get("reason") else ""
    return f"Prefill and decode: {disagg['decision']}{where}{why}."


def _after(decision: Json) -> str:
    outcome = decision["outcome"]
    parts = []
    if served_by := outcome.get("served_by"):
        parts.append(f"answered by {served_by}")
    if (status := outcome.get("status")) is None:
        parts.append("not known to have ended")
    else:
        attempts = outcome.get("attempts") or 1
        tries = f" after {attempts} attempts" if attempts > 1 else ""
        parts.append(f"ended with status {status}{tries}")
    for name in ("dropped_reason", "flags"):
        if name in outcome:
            parts.append(str(outcome[name]))
    if (first := outcome.get("first_token_s")) is not None:
        parts.append(f"first token after {first:.3f} s")
    if (duration := outcome.get("duration_s")) is not None:
        parts.append(f"{duration:.3f} s in all")
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _cached(decision: Json) -> str:
    predicted = decision.get("predicted_cached_tokens", -1)
    if predicted < 0:
        return ""
    of = f"of {decision['prompt_tokens']} prompt tokens {predicted} were predicted to be cached"
    reported = decision["outcome"].get("cached_tokens")
    if reported is None:
        return f"Cache: {of}; the engine reported none."
    verdict = "as" if reported == predicted else "but"
    return f"Cache: {of}, {verdict} the engine reported {reported}."
