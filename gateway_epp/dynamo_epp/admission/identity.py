"""Who asks, and how urgent it is: only as far as somebody trusted says so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from dynamo_epp.admission.settings import (
    FAIRNESS_ID_HEADERS,
    OBJECTIVE_HEADERS,
    IdentitySettings,
)

DEFAULT_TENANT = "default-flow"
"""The fairness id of requests that have none (llm-d's word)."""
MAX_TENANT = 128
"""Characters of a tenant's name; longer ones are cut."""

Objectives = Callable[[str], int | None]
"""The priority of a named objective, ``None`` if there is none of that name."""


def no_objectives(_: str) -> int | None:
    return None


def tenant_of(headers: Mapping[str, str], settings: IdentitySettings) -> str:
    """The tenant of a request with ``headers`` (lower-case names)."""
    names = [settings.tenant_header.lower()] if settings.tenant_header else []
    if settings.trust_client_headers:
        names.extend(FAIRNESS_ID_HEADERS)
    for name in names:
        if value := headers.get(name, "").strip():
            return value[:MAX_TENANT]
    if settings.api_key:
        scheme, _, key = headers.get("authorization", "").strip().partition(" ")
        if key := key.strip() or scheme:
            return f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return DEFAULT_TENANT


def priority_of(
    headers: Mapping[str, str], settings: IdentitySettings, objectives: Objectives = no_objectives
) -> int:
    """Its priority; 0 where nobody trusted says something that can be understood."""
    if settings.priority_header:
        value = headers.get(settings.priority_header.lower(), "").strip()
        if value.removeprefix("-").isdecimal() and len(value) <= 10:
            return int(value)
    if settings.trust_client_headers:
        for name in OBJECTIVE_HEADERS:
            if objective := headers.get(name, "").strip():
                return objectives(objective) or 0
    return 0
