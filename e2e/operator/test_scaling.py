"""The scaling adapter with real pods: kubectl scale, a HorizontalPodAutoscaler, and who rules."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from e2e.load.constant import ConstantLoad
from e2e.operator import graphs
from e2e.operator.metrics_api import MetricsApi
from e2e.operator.space import Json, Space, is_ready

pytestmark = pytest.mark.usefixtures("direct")

NAME = "scaled"
ADAPTER = "scaled-worker"
RATE = float(os.environ.get("E2E_RATE", "100"))
METRIC = "queued_requests"
IGNORED = "GraphReplicasIgnored"


def scaled(replicas: int = 1, adapter: bool = True) -> Json:
    fields: Json = {"scalingAdapter": {}} if adapter else {}
    return graphs.graph(NAME, graphs.frontend(), graphs.worker(replicas, fields=fields))


def settled(space: Space, count: int) -> bool:
    """Whether so many workers are there, all ready, and no others."""
    pods = space.pods(NAME, "Worker", ending=True)
    return len(pods) == count and all(map(is_ready, pods))


def scaling(space: Space) -> Json:
    """The worker's condition ScalingActive."""
    worker = space.get("dgd", NAME)["status"]["components"]["Worker"]
    found: Json = next((c for c in worker["conditions"] if c["type"] == "ScalingActive"), {})
    return found


@pytest.mark.timeout(300)
def test_an_adapter_rules_while_it_exists(space: Space) -> None:
    space.apply(scaled(1))
    space.wait_ready(NAME)
    space.kubectl("scale", "dgdsa", ADAPTER, "--replicas=2")
    space.until(lambda: settled(space, 2), "two workers")
    scale = space.get("dgdsa", ADAPTER)["status"]
    assert scale["replicas"] == 2
    assert len(space.list("pods", scale["selector"])) == 2

    # The graph's own number changes: told, not obeyed.
    space.apply(scaled(3))
    space.until(lambda: scaling(space).get("reason") == IGNORED, "told as a condition")
    assert f"kubectl scale dgdsa/{ADAPTER}" in scaling(space)["message"]
    space.until(
        lambda: [e for e in space.list("events") if e["reason"] == IGNORED], "told as an event"
    )
    (event,) = [e for e in space.list("events") if e["reason"] == IGNORED]
    assert event["type"] == "Warning"
    assert "is 3" in event["message"]
    assert settled(space, 2)

    # The adapter goes: what runs stays until the graph's number changes.
    space.apply(scaled(3, adapter=False))
    space.until(lambda: not space.exists("dgdsa", ADAPTER), "adapter gone")
    space.wait_ready(NAME)
    assert settled(space, 2)
    space.apply(scaled(1, adapter=False))
    space.until(lambda: settled(space, 1), "the graph's number")


@pytest.fixture
def metrics(bare_space: Space) -> Iterator[MetricsApi]:
    with MetricsApi(bare_space, METRIC) as api:
        yield api


def autoscaler(version: str) -> Json:
    """Three queued requests a worker, and no patience."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "worker"},
        "spec": {
            "scaleTargetRef": {
                "apiVersion": f"nvidia.com/{version}",
                "kind": "DynamoGraphDeploymentScalingAdapter",
                "name": ADAPTER,
            },
            "minReplicas": 1,
            "maxReplicas": 3,
            "metrics": [
                {
                    "type": "External",
                    "external": {
                        "metric": {"name": METRIC},
                        "target": {"type": "AverageValue", "averageValue": "3"},
                    },
                }
            ],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}},
        },
    }


@pytest.mark.parametrize("version", ["v1beta1", "v1alpha1"])
@pytest.mark.timeout(400)
def test_an_autoscaler_scales_and_loses_nothing(
    installed_space: Space, metrics: MetricsApi, version: str
) -> None:
    """1 → 3 → 1 through the adapter, as upstream's examples address it."""
    space = installed_space
    metrics.value = 1
    space.apply(scaled(1))
    space.wait_ready(NAME)
    space.apply(autoscaler(version))
    with ConstantLoad(space.url(NAME), rate=RATE) as load:
        metrics.value = 9
        space.until(
            lambda: settled(space, 3), "scaled up", 180.0, lambda: space.kubectl("describe", "hpa")
        )
        load.wait_until(5.0)
        metrics.value = 1
        space.until(
            lambda: settled(space, 1),
            "scaled down",
            180.0,
            lambda: space.kubectl("describe", "hpa"),
        )
    result = load.result
    assert not result.failures, str(result)
    assert result.answered == result.sent
    assert not result.unroutable, str(result)
    columns = space.columns(NAME)
    assert (columns["READY"], columns["STATE"]) == ("True", "successful")
