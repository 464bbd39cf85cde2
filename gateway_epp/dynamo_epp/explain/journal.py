"""The journal: the last decisions, and the last refusals.

Each decision is kept, with its candidates and their reasons, until newer ones push it out. Requests
that were refused before there was a decision are kept apart, so that a flood of them pushes nothing
out that went somewhere.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from heapq import merge
from itertools import islice
from typing import Any, TypeVar

from dynamo_epp.explain.entries import Entry, Refused

TOTALS = 20
"""Reasons counted by name; rarer ones are left out."""


class Journal:
    """The last ``capacity`` decisions, by request id (the newest wins where ids repeat), and a
    quarter as many refusals."""

    def __init__(self, capacity: int = 2000) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._refused: OrderedDict[str, Refused] = OrderedDict()

    def add(self, entry: Entry) -> None:
        self._refused.pop(entry.request_id, None)
        _push(self._entries, entry, self._capacity)

    def refuse(self, refused: Refused) -> None:
        """Keep a refusal; a decision under the same id stays, it says more."""
        if refused.request_id not in self._entries:
            _push(self._refused, refused, max(1, self._capacity // 4))

    def keep(self, entry: Entry) -> None:
        """Put back an entry that was pushed out while its request ran: its end is news."""
        if entry.request_id not in self._entries:
            self.add(entry)

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def find(self, request_id: str) -> Entry | Refused | None:
        """What is known of a request, whether it went somewhere or not."""
        return self._entries.get(request_id) or self._refused.get(request_id)

    def newest(self, limit: int, *, worker: str = "", model: str = "") -> Iterator[Entry | Refused]:
        """The newest first, at most ``limit`` of those that ``worker`` had and that asked for
        ``model`` ("": any)."""
        both: Iterator[Entry | Refused] = merge(
            reversed(self._entries.values()),
            reversed(self._refused.values()),
            key=lambda each: each.time,
            reverse=True,
        )
        wanted = (
            each
            for each in both
            if (not worker or worker in each.workers) and (not model or model == each.model)
        )
        return islice(wanted, limit)

    def totals(self) -> dict[str, Any]:
        """How often each ``how`` and each reason is among what is kept."""
        refused = Counter(each.reason for each in self._refused.values())
        return {
            "decisions": len(self._entries),
            "since": min((each.time for each in self._entries.values()), default=None),
            "how": Counter(str(each.kept.shell.how) for each in self._entries.values()),
            "reasons": dict(
                Counter(each.reason for each in self._entries.values() if each.reason).most_common(
                    TOTALS
                )
            ),
            "refused": dict(refused.most_common(TOTALS)),
        }

    def __len__(self) -> int:
        return len(self._entries)


_E = TypeVar("_E", Entry, Refused)


def _push(entries: OrderedDict[str, _E], entry: _E, capacity: int) -> None:
    entries.pop(entry.request_id, None)
    entries[entry.request_id] = entry
    if len(entries) > capacity:
        entries.popitem(last=False)
