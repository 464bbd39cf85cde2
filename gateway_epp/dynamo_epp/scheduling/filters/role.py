"""Keeps the workers that can do one part of a request: encode, prefill or decode.

The role is what the pod's label ``llm-d.ai/role`` says, and otherwise the endpoint's own
(``worker`` does everything but encode). Source: llm-d's role filters.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import NoParameters

ROLE_LABEL = "llm-d.ai/role"
ALL = frozenset({"prefill-decode", "both", "encode-prefill-decode"})


class Role:
    """``suits``: roles that can do the part."""

    def __init__(self, part: str, suits: frozenset[str]) -> None:
        self._part = part
        self._suits = suits

    def reasons(self, ask: Ask, candidates: Sequence[Candidate]) -> list[str]:
        return [self._reason(ask, candidate) for candidate in candidates]

    def _reason(self, ask: Ask, candidate: Candidate) -> str:
        endpoint = ask.worker(candidate).endpoint
        role = endpoint.labels.get(ROLE_LABEL) or endpoint.role
        return "" if role in self._suits else f"role {role} does no {self._part}"


def decode(_: NoParameters) -> Role:
    return Role("decode", ALL | {"decode", "worker"})


def prefill(_: NoParameters) -> Role:
    return Role("prefill", ALL | {"prefill", "encode-prefill", "worker"})


def encode(_: NoParameters) -> Role:
    return Role("encode", frozenset({"encode", "encode-prefill", "encode-prefill-decode"}))
