"""Where engines send their KV events, as llm-d's precise prefix cache is told.

Its plugins have a section ``kvEventsConfig``; where that has a ``zmqEndpoint``, llm-d binds the
address, and engines connect to it. Without one they are found and asked, as always here.
Source: ``pkg/kvevents.Config`` of llm-d-kv-cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dynamo_crds.problem import Finding
from dynamo_crds.schema import Path

SECTION = "kvEventsConfig"
PLUGINS = ("precise-prefix-cache-producer", "precise-prefix-cache-scorer")
TOPIC = "kv@"


class KvEvents(NamedTuple):
    bind: str
    """A ZeroMQ address, such as ``tcp://*:5557``."""
    topic: str
    """How the topics that are heard begin."""


def wrong(parameters: Mapping[str, Any], path: Path) -> Iterator[Finding]:
    """Mistakes in the section of a plugin whose ``parameters`` are at ``path``."""
    section = parameters.get(SECTION)
    if section is None:
        return
    if not isinstance(section, Mapping):
        yield Finding((*path, SECTION), section, "an object", "not an object")
        return
    for name, expected in (("zmqEndpoint", "tcp://*:5557"), ("topicFilter", TOPIC)):
        value = section.get(name)
        if value is not None and not isinstance(value, str):
            yield Finding((*path, SECTION, name), value, f"a text, such as {expected}", "no text")
    endpoint = section.get("zmqEndpoint")
    if isinstance(endpoint, str) and endpoint and not endpoint.startswith(("tcp://", "ipc://")):
        at = (*path, SECTION, "zmqEndpoint")
        yield Finding(at, endpoint, "tcp://ADDRESS:PORT, such as tcp://*:5557", "no such address")


def settings(parameters: Mapping[str, Any]) -> KvEvents | None:
    """None: nothing is to be bound. ``parameters`` are without mistakes."""
    section = parameters.get(SECTION) or {}
    endpoint = section.get("zmqEndpoint") or ""
    return KvEvents(endpoint, section.get("topicFilter") or TOPIC) if endpoint else None
