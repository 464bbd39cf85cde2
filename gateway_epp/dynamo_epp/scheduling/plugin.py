"""The seams of scheduling: filters drop, scorers score, pickers order.

A plugin is a small pure object. It is made once from its parameters, sees a request and the
candidates that are left, and answers with one value for each of them, in their order. What it
remembers between requests (a session's worker, who was last sent a cold prompt) it learns through
``picked`` and from nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from dynamo_kv_router.choice import Candidate, Decision, Rng

from dynamo_epp.scheduling.ask import Ask


@runtime_checkable
class Filter(Protocol):
    def reasons(self, ask: Ask, candidates: Sequence[Candidate]) -> list[str]:
        """For each candidate "" or, in words, why it is dropped."""
        ...


@runtime_checkable
class Scorer(Protocol):
    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        """For each candidate a score in [0, 1]; higher is better. What is outside is clamped."""
        ...


@runtime_checkable
class Picker(Protocol):
    limit: int
    """Endpoints that may be named; 0: as many as whoever asks wants."""

    def order(
        self, candidates: Sequence[Candidate], totals: Sequence[float], rng: Rng, turn: int
    ) -> list[int]:
        """Indices of the candidates, best first. ``totals`` are their weighted sums of scores,
        ``turn`` counts the choices."""
        ...


@runtime_checkable
class Answers(Protocol):
    def answer_headers(self, decision: Decision) -> tuple[tuple[str, str], ...]:
        """Headers for the client's answer, where the process relays answers."""
        ...


@runtime_checkable
class Watcher(Protocol):
    def picked(self, ask: Ask, decision: Decision) -> None:
        """The request goes to the first of ``decision``, which has one."""
        ...
