"""Kubernetes Events: what a person wants to know of an object; `kubectl describe` shows them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

Json = dict[str, Any]

LONGEST_MESSAGE = 1024  # characters; the API server refuses longer ones
_LONGEST_NAME = 230  # of the object, so that the event's name stays within 253


def event(
    about: Mapping[str, Any],
    kind: Literal["Normal", "Warning"],
    reason: str,
    message: str,
    *,
    component: str,
    instance: str,
    now: datetime,
) -> Json:
    """An Event about the object ``about``; ``instance`` names the process of ``component`` that
    tells. ``now`` is UTC."""
    metadata = about["metadata"]
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name'][:_LONGEST_NAME]}.{secrets.token_hex(8)}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": about["apiVersion"],
            "kind": about["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        },
        "type": kind,
        "reason": reason,
        "message": message[:LONGEST_MESSAGE],
        "count": 1,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "source": {"component": component},
        "reportingComponent": component,
        "reportingInstance": instance,
    }
