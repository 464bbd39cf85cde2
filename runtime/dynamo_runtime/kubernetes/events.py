"""Kubernetes Events: what a person wants to know of an object; `kubectl describe` shows them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.resources import EVENTS

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


async def tell(client: KubernetesClient, told: Json) -> None:
    """Post ``told``, an ``event``. What was said before of that object in the same words, by
    whichever process, is counted there: `kubectl describe` shows it once, with how often and since
    when. Takes the rights to create and patch events; raises ``ApiError``.
    """
    about, metadata = told["involvedObject"], told["metadata"]
    said = "\0".join((about["uid"], told["type"], told["reason"], told["message"]))
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    name = f"{about['name'][:_LONGEST_NAME]}.{digest}"
    try:
        await client.create({**told, "metadata": {**metadata, "name": name}})
        return
    except ApiError as error:
        if error.status != 409:
            raise
    path = EVENTS.path(metadata["namespace"], name)
    seen = await client.merge_patch(path, {"lastTimestamp": told["lastTimestamp"]})
    await client.merge_patch(path, {"count": seen.get("count", 1) + 1})
