"""Why a request went where it went: the journal of decisions.

Each decision is kept, with every candidate and its reasons, until newer ones push it out. What the
workers and Envoy tell later about the same request is added to its entry, so that one lookup gives
pick, outcome and the engine's own counts side by side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dynamo_kv_router.choice import Candidate, Decision, Scored
from msgspec.structs import asdict


@dataclass(slots=True, eq=False)
class Entry:
    """One request in the journal."""

    request_id: str
    time: float  # Unix seconds of the pick
    path: str
    model: str
    stream: bool
    decision: Decision
    reason: str  # why the decision is not exact; "" if it is
    prompt_tokens: int  # -1 if the prompt was not tokenized
    stages_ms: dict[str, float]
    outcome: dict[str, Any] = field(default_factory=dict)
    """What came after: status, upstream, attempts, first_byte_s, duration_s (Envoy);
    blind_window_s, first_token_s, prompt_tokens, cached_tokens, completion_tokens (worker)."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `/debug/decisions`."""
        decision = self.decision
        return {
            "request_id": self.request_id,
            "time": self.time,
            "path": self.path,
            "model": self.model,
            "stream": self.stream,
            "how": str(decision.how),
            "mode": decision.mode,
            "reason": self.reason,
            "routing": decision.routing(),
            "prompt_tokens": self.prompt_tokens,
            "block_size": decision.size.block_size,
            "blocks": decision.size.blocks,
            "candidates": [
                *(_ranked(decision, scored) for scored in decision.ranked),
                *(_dropped(candidate) for candidate in decision.dropped),
            ],
            "stages_ms": self.stages_ms,
            "outcome": self.outcome,
        }


def _ranked(decision: Decision, scored: Scored) -> dict[str, Any]:
    terms = decision.terms(scored)
    return {**asdict(scored.candidate), "cost": scored.cost, "terms": terms}


def _dropped(candidate: Candidate) -> dict[str, Any]:
    return {**asdict(candidate), "cost": None, "terms": {}}


class Journal:
    """The last ``capacity`` decisions, by request id (the newest wins where ids repeat)."""

    def __init__(self, capacity: int = 2000) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def add(self, entry: Entry) -> None:
        self._entries.pop(entry.request_id, None)
        self._entries[entry.request_id] = entry
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)

    def keep(self, entry: Entry) -> None:
        """Put back an entry that was pushed out while its request ran: its end is news."""
        if entry.request_id not in self._entries:
            self.add(entry)

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def newest(self, limit: int) -> Iterator[Entry]:
        """The newest first, at most ``limit``."""
        for number, request_id in enumerate(reversed(self._entries)):
            if number >= limit:
                return
            yield self._entries[request_id]

    def __len__(self) -> int:
        return len(self._entries)
