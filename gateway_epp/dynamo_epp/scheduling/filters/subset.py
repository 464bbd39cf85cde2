"""The gateway's subset hint: the only endpoints that may be chosen (protocol 004)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dynamo_kv_router.choice import Candidate
from msgspec.structs import replace

OUTSIDE = "outside the gateway's subset"


def within(subset: Sequence[str], candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates, those outside ``subset`` dropped.

    ``subset`` holds endpoints as ``ip:port``, or a bare ``ip`` (IPv6 with or without brackets) for
    all its ports; empty, nobody may be chosen. A candidate that was dropped keeps its reason.
    Prefill workers are none of a gateway's destinations, and stay.
    """
    allowed = frozenset(subset)
    return [
        candidate
        if candidate.dropped or candidate.role == "prefill" or _allows(allowed, candidate.endpoint)
        else replace(candidate, dropped=OUTSIDE)
        for candidate in candidates
    ]


def _allows(allowed: frozenset[str], endpoint: str) -> bool:
    host = endpoint.rpartition(":")[0]
    return endpoint in allowed or host in allowed or host.strip("[]") in allowed
