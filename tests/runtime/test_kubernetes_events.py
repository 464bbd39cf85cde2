"""Events: what is said again is counted, whoever says it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.events import Json, event, tell

from tests.runtime.kube_api import failure, serving

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
EVENTS = "/api/v1/events"
What = tuple[Literal["Normal", "Warning"], str, str]
READY: What = ("Normal", "Ready", "all is well")
NOT_READY: What = ("Warning", "NotReady", "none is left")


def said(what: What, minute: int, instance: str, uid: str = "u") -> Json:
    about = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "g", "namespace": "team", "uid": uid},
    }
    now = NOW + timedelta(minutes=minute)
    return event(about, *what, component="operator", instance=instance, now=now)


async def test_what_is_said_again_is_counted_also_by_another_process() -> None:
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        await tell(client, said(READY, 0, "a"))
        await tell(client, said(NOT_READY, 1, "a"))
        await tell(client, said(READY, 2, "a"))
        await tell(client, said(READY, 3, "b"))
        await tell(client, said(READY, 4, "b", uid="of a graph that has the name now"))
    found = sorted(
        (item["reason"], item["count"], item["firstTimestamp"][11:16], item["lastTimestamp"][11:16])
        for key, item in api.objects.items()
        if key[0] == EVENTS
    )
    assert found == [
        ("NotReady", 1, "12:01", "12:01"),
        ("Ready", 1, "12:04", "12:04"),
        ("Ready", 3, "12:00", "12:03"),
    ]


async def test_a_refusal_is_the_callers() -> None:
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        api.failures.append(lambda _: failure(403, "Forbidden", "forbidden"))
        with pytest.raises(ApiError, match="forbidden"):
            await tell(client, said(READY, 0, "a"))
