"""Conditions as chains of checks, as in cert-manager: the first check that has a say wins.

A check is a pure function of the facts. It reads no clock: a verdict changes only when the world
does, so nothing needs to be looked at again later, and no message ages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, TypeVar

from dynamo_operator.diagnosis.wording import bounded, one_line
from dynamo_operator.reconcile.observed import Json

Facts = TypeVar("Facts")
_Facts = TypeVar("_Facts", contravariant=True)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a condition is to say."""

    status: Literal["True", "False", "Unknown"]
    reason: str
    """One word for programs; stable."""
    message: str
    """One line for people: what is, why, what to do."""


class Check(Protocol[_Facts]):
    """A verdict, or None if the check has nothing to say."""

    def __call__(self, facts: _Facts, /) -> Verdict | None: ...


def chain(facts: Facts, *checks: Check[Facts]) -> Verdict | None:
    """The first check's verdict that has one; None if none has."""
    for check in checks:
        verdict = check(facts)
        if verdict is not None:
            return verdict
    return None


def timestamp(now: datetime) -> str:
    """`now` (aware) as Kubernetes writes it: `2026-01-31T12:00:00Z`."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(
    type: str, verdict: Verdict, old: Mapping[str, Any], generation: int, now: datetime
) -> Json:
    """The verdict as a condition. `old` is the condition of that type until now, or empty: its
    time is kept while the status stays."""
    since = old.get("lastTransitionTime")
    if old.get("status") != verdict.status or not isinstance(since, str) or not since:
        since = timestamp(now)
    return {
        "type": type,
        "status": verdict.status,
        "reason": verdict.reason,
        "message": bounded(one_line(verdict.message)),
        "lastTransitionTime": since,
        "observedGeneration": generation,
    }
