"""What keeps a picker from choosing as well as it could, for people: found, and told once.

A picker that can't be exact goes on with what it has, and each decision says so. That is for those
who look; whoever does not gets an Event when a problem lasts, and one when it is over. Pure: the
workers and the time are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dynamo_epp.endpoints.worker import Worker

LASTING_S = 30.0
"""Shorter ones are told by metrics only: every start and every restart has some."""
AGAIN_S = 600.0
"""The same problem is told at most so often, however it flaps."""
NAMED = 3
"""Workers that a sentence names."""

RESOLVED = {
    "TokensDiffer": "TokensAgree",
    "TokenizerMissing": "TokenizerLoaded",
    "CacheUnknown": "CacheKnown",
    "LoadUnknown": "LoadKnown",
    "CircuitOpen": "CircuitClosed",
}
"""Reason of a problem -> reason of its end."""


def problems(
    workers: Collection[Worker],
    *,
    differing: Iterable[str],
    missing: Iterable[str],
    by_cache: bool,
) -> dict[str, str]:
    """Reason -> what is wrong and what it means, in sentences.

    ``differing`` and ``missing`` say of which models tokens differ from the engine's, and why
    tokenizers are not there; ``by_cache``: caches count for the choice at all.
    """
    ready = [w for w in workers if w.endpoint.ready and not w.endpoint.terminating]
    found = {
        "TokensDiffer": "; ".join(differing),
        "TokenizerMissing": "; ".join(missing),
        "CacheUnknown": _of(ready, lambda w: "" if w.live and w.exact else _cache(w))
        if by_cache
        else "",
        "LoadUnknown": _of(ready, lambda w: w.load_problem),
        "CircuitOpen": _of(ready, lambda w: w.circuit),
    }
    means = {
        "TokensDiffer": "such requests are routed by load",
        "TokenizerMissing": "requests are routed by load",
        "CacheUnknown": "their caches count in part or not at all",
        "LoadUnknown": "their load is what this picker sent them",
        "CircuitOpen": "they get no requests until a probe succeeds",
    }
    return {reason: f"{what}. {means[reason]}" for reason, what in found.items() if what}


def _cache(worker: Worker) -> str:
    return worker.problem or ("" if worker.tracked else "publishes no KV events")


def _of(ready: Collection[Worker], why: Callable[[Worker], str]) -> str:
    """`2 of 8 workers: a, b (no answer)`; "" if all is well."""
    affected = [(worker.name, text) for worker in ready if (text := why(worker))]
    if not affected:
        return ""
    names = ", ".join(name for name, _ in affected[:NAMED])
    more = ", …" if len(affected) > NAMED else ""
    return f"{len(affected)} of {len(ready)} workers: {names}{more} ({affected[0][1]})"


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing to tell."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(slots=True)
class Told:
    """Which problems there are since when, and which of them people know of."""

    _since: dict[str, float] = field(default_factory=dict)  # reason -> seconds
    _told_at: dict[str, float] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)  # told, and not over

    def news(self, found: Mapping[str, str], now: float) -> list[Notice]:
        """What is to be told now. ``found`` is what ``problems`` returns, ``now`` seconds."""
        notices = []
        for reason, message in found.items():
            since = self._since.setdefault(reason, now)
            lately = now - self._told_at.get(reason, -AGAIN_S) < AGAIN_S
            if reason not in self._known and now - since >= LASTING_S and not lately:
                self._known.add(reason)
                self._told_at[reason] = now
                notices.append(Notice("Warning", reason, message))
        for reason in [reason for reason in self._since if reason not in found]:
            lasted = now - self._since.pop(reason)
            if reason in self._known:
                self._known.remove(reason)
                message = f"over after {lasted:.0f} s"
                notices.append(Notice("Normal", RESOLVED[reason], message))
        return notices
