"""Claims that a graph written in v1alpha1 asks to have made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dynamo_crds import v1alpha1
from dynamo_crds.conversion import SAID_IN_V1ALPHA1, to_v1beta1

from e2e.operator import graphs
from e2e.operator.operators import HostOperator
from e2e.operator.space import Json, Space

GRAPH, CLAIM = "volumes", "volumes-models"
MOUNTED = "/models"


@pytest.fixture
def storage_class(space: Space) -> Iterator[str]:
    """The class of one volume of a gigabyte, that nobody else asks for."""
    name = space.name
    space.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "storageClassName": name,
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteMany"],
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": f"/var/lib/{name}", "type": "DirectoryOrCreate"},
            },
        }
    )
    yield name
    space.kubectl("delete", "dgd", GRAPH, "--ignore-not-found")
    space.cluster.kubectl("delete", "pv", name)


def older(storage_class: str) -> Json:
    """A graph as v1alpha1 says it, in the version that is stored."""
    frontend, worker = (
        graphs.container(image, args)
        for image, args in (("frontend", None), ("worker", ["--served-model-name", graphs.MODEL]))
    )
    for main in (frontend, worker):
        main.pop("name")
    claim = {"name": CLAIM, "create": True, "storageClass": storage_class, "size": "1Gi"}
    written = {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": GRAPH},
        "spec": {
            "pvcs": [{**claim, "volumeAccessMode": "ReadWriteMany"}],
            "services": {
                "Frontend": {
                    "componentType": "frontend",
                    "replicas": 1,
                    "extraPodSpec": {"mainContainer": frontend},
                },
                "Worker": {
                    "componentType": "worker",
                    "replicas": 1,
                    "volumeMounts": [{"name": CLAIM, "mountPoint": MOUNTED}],
                    "extraPodSpec": {"mainContainer": worker},
                },
            },
        },
    }
    return to_v1beta1(v1alpha1.DynamoGraphDeployment.model_validate(written)).manifest()


@pytest.mark.timeout(300)
def test_a_claim_is_made_mounted_and_goes_with_the_graph(
    space: Space, operator: HostOperator, storage_class: str
) -> None:
    space.apply(older(storage_class))
    space.wait_ready(GRAPH)
    claim = space.get("pvc", CLAIM)
    assert (claim["status"]["phase"], claim["spec"]["volumeName"]) == ("Bound", storage_class)
    (worker,) = space.pods(GRAPH, "Worker")
    mounts = space.kubectl(
        *("exec", worker["metadata"]["name"], "-c", "main", "--", "cat", "/proc/mounts")
    )
    assert MOUNTED in [line.split()[1] for line in mounts.splitlines()]

    # What a volume holds is not given up for an edit.
    reconciles = operator.metric("controller_runtime_reconcile_total")
    space.annotate("dgd", GRAPH, f"{SAID_IN_V1ALPHA1}-")
    space.until(
        lambda: operator.metric("controller_runtime_reconcile_total") > reconciles, "reconciled"
    )
    space.wait_ready(GRAPH)
    left = space.get("pvc", CLAIM)["metadata"]
    assert left["uid"] == claim["metadata"]["uid"]
    assert "deletionTimestamp" not in left

    space.kubectl("delete", "dgd", GRAPH)
    space.until(lambda: not space.exists("pvc", CLAIM), "the claim goes with the graph", 90.0)
