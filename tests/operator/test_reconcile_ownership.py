"""Whether an object still is what was applied, on field records as a real API server wrote them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from dynamo_operator.reconcile.ownership import (
    APPLIED_ANNOTATION,
    FIELD_MANAGER,
    is_applied,
    lost,
    stamped,
    writers,
)
from hypothesis import given
from hypothesis import strategies as st

Json = dict[str, Any]

MANIFEST: Json = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "sample", "namespace": "default", "labels": {"a": "b"}},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "x"}},
        "template": {
            "metadata": {"labels": {"app": "x"}},
            "spec": {
                "containers": [
                    {
                        "name": "main",
                        "image": "i:1",
                        "args": ["--a", "--b"],
                        "env": [
                            {"name": "A", "value": "1"},
                            {
                                "name": "B",
                                "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}},
                            },
                        ],
                        "ports": [{"containerPort": 8000, "name": "http"}],
                        "resources": {"limits": {"cpu": "1000m", "nvidia.com/gpu": 1}},
                        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                    }
                ],
                "volumes": [{"name": "tmp", "emptyDir": {}}],
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
            },
        },
    },
}
# As kube-apiserver 1.36 recorded it when MANIFEST was applied.
RECORDED = json.loads(r"""
{"f:metadata": {"f:annotations": {"f:nvidia.com/dynamo-applied": {}}, "f:labels": {"f:a": {}}},
 "f:spec": {"f:replicas": {}, "f:selector": {}, "f:template": {"f:metadata": {"f:labels": {"f:app":
 {}}}, "f:spec": {"f:containers": {"k:{\"name\":\"main\"}": {".": {}, "f:args": {}, "f:env":
 {"k:{\"name\":\"A\"}": {".": {}, "f:name": {}, "f:value": {}}, "k:{\"name\":\"B\"}": {".": {},
 "f:name": {}, "f:valueFrom": {"f:fieldRef": {}}}}, "f:image": {}, "f:name": {}, "f:ports":
 {"k:{\"containerPort\":8000,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}, "f:name":
 {}}}, "f:resources": {"f:limits": {"f:cpu": {}, "f:nvidia.com/gpu": {}}}, "f:volumeMounts":
 {"k:{\"mountPath\":\"/tmp\"}": {".": {}, "f:mountPath": {}, "f:name": {}}}}}, "f:tolerations": {},
 "f:volumes": {"k:{\"name\":\"tmp\"}": {".": {}, "f:emptyDir": {}, "f:name": {}}}}}}}
""")
DESIRED = stamped(MANIFEST)


def live() -> Json:
    """The object as the API server gave it back: quantities and defaults are its own."""
    item = copy.deepcopy(DESIRED)
    item["metadata"]["managedFields"] = [
        {"manager": "kubelet", "operation": "Update", "subresource": "status", "fieldsV1": {}},
        {
            "manager": FIELD_MANAGER,
            "operation": "Apply",
            "fieldsType": "FieldsV1",
            "fieldsV1": copy.deepcopy(RECORDED),
        },
    ]
    container = item["spec"]["template"]["spec"]["containers"][0]
    container["resources"]["limits"] = {"cpu": "1", "nvidia.com/gpu": "1"}
    container["ports"][0]["protocol"] = "TCP"
    container["terminationMessagePath"] = "/dev/termination-log"
    return item


def paths(node: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every owned field of a record."""
    for key, child in node.items():
        if key != ".":
            if not [k for k in child if k != "."]:
                yield (*path, key)
            yield from paths(child, (*path, key))


def test_defaults_and_other_writings_of_a_value_are_no_drift() -> None:
    assert is_applied(DESIRED, live())


# An empty map may have been dropped or taken over; the record can't tell which.
TELLING = [field for field in paths(RECORDED) if field[-1] != "f:emptyDir"]


@pytest.mark.parametrize("field", TELLING, ids=lambda field: field[-1])
def test_each_field_that_another_takes_over_is_noticed(field: tuple[str, ...]) -> None:
    item = live()
    nodes = [item["metadata"]["managedFields"][1]["fieldsV1"]]
    for key in field[:-1]:
        nodes.append(nodes[-1][key])
    for key, node in zip(reversed(field), reversed(nodes), strict=True):
        del node[key]
        if node:  # a record has no empty branches
            break
    assert not is_applied(DESIRED, item)
    assert list(lost(DESIRED, item))


def test_another_manifest_is_noticed() -> None:
    changed = copy.deepcopy(MANIFEST)
    changed["spec"]["template"]["spec"]["containers"][0]["image"] = "i:2"
    assert not is_applied(stamped(changed), live())


def test_a_field_that_is_given_up_is_noticed() -> None:
    fewer = copy.deepcopy(MANIFEST)
    del fewer["spec"]["template"]["spec"]["tolerations"]
    assert not is_applied(stamped(fewer), live())


def test_what_is_gone_or_going_is_not_applied() -> None:
    assert not is_applied(DESIRED, None)
    going = live()
    going["metadata"]["deletionTimestamp"] = "2000-01-01T00:00:00Z"
    assert not is_applied(DESIRED, going)


def test_what_others_add_is_theirs() -> None:
    item = live()
    item["spec"]["template"]["spec"]["containers"].append({"name": "sidecar", "image": "mesh"})
    item["metadata"]["annotations"]["mesh"] = "injected"
    assert is_applied(DESIRED, item)


def test_empty_and_null_values_belong_to_nobody() -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest["spec"]["template"]["spec"]["nodeSelector"] = {}
    manifest["spec"]["template"]["spec"]["affinity"] = None
    assert not list(lost(manifest, live()))


def test_who_writes_a_field() -> None:
    item = live()
    item["metadata"]["managedFields"].append(
        {
            "manager": "kube-controller-manager",
            "operation": "Update",
            "subresource": "scale",
            "fieldsV1": {"f:spec": {"f:replicas": {}}},
        }
    )
    assert writers(item, ("spec", "replicas")) == [
        (FIELD_MANAGER, ""),
        ("kube-controller-manager", "scale"),
    ]


@given(st.dictionaries(st.text(max_size=3), st.integers(), max_size=3))
def test_the_stamp_depends_on_content_only(labels: dict[str, int]) -> None:
    one = {"kind": "K", "metadata": {"name": "n", "labels": labels}}
    other = {"metadata": {"labels": dict(reversed(labels.items())), "name": "n"}, "kind": "K"}
    marks = [m["metadata"]["annotations"][APPLIED_ANNOTATION] for m in map(stamped, (one, other))]
    assert marks[0] == marks[1]
    assert "annotations" not in one["metadata"]
