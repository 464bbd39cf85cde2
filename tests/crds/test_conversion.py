"""Round trips lose nothing, in either direction, with and without changes in between."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from dynamo_crds import v1alpha1, v1beta1
from dynamo_crds.conversion import (
    SAID_IN_V1ALPHA1,
    SAID_IN_V1BETA1,
    adapter_to_v1alpha1,
    adapter_to_v1beta1,
    convert,
    said_in_v1alpha1,
    to_v1alpha1,
    to_v1beta1,
)
from dynamo_crds.load import load_documents, parse
from dynamo_crds.schema import without_null
from dynamo_crds.services import component_of, service_like, service_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

Json = dict[str, Any]


def alpha(manifest: Json) -> v1alpha1.DynamoGraphDeployment:
    return v1alpha1.DynamoGraphDeployment.model_validate(manifest)


def beta(manifest: Json) -> v1beta1.DynamoGraphDeployment:
    return v1beta1.DynamoGraphDeployment.model_validate(manifest)


def main_of(component: v1beta1.Component) -> Json:
    assert component.pod_template is not None
    (main,) = [c for c in component.pod_template["spec"]["containers"] if c["name"] == "main"]
    assert isinstance(main, dict)
    return main


def test_what_a_service_becomes(v1alpha1_text: str) -> None:
    graph = to_v1beta1(alpha(yaml.safe_load(v1alpha1_text)))
    assert [e.name for e in graph.spec.env] == ["HF_HOME"]
    frontend, decode = graph.spec.components
    assert (frontend.name, frontend.type, decode.name, decode.type) == (
        "Frontend",
        "frontend",
        "Decode",
        "decode",
    )
    assert main_of(frontend) == {"name": "main", "image": "dynamo-platform/frontend:1"}
    assert main_of(decode) == {
        "name": "main",
        "image": "dynamo-platform/vllm:1",
        "args": ["--model", "tiny"],
        "env": [{"name": "LEVEL", "value": "info"}],
        "envFrom": [{"secretRef": {"name": "hf-token"}}],
        "resources": {
            "requests": {"cpu": "4"},
            "limits": {"nvidia.com/gpu": "1", "memory": "8Gi", "rdma/ib": "1"},
        },
        "volumeMounts": [{"name": "models", "mountPath": "/models"}],
        "livenessProbe": {"httpGet": {"path": "/live", "port": 9090}},
    }
    assert decode.pod_template is not None
    assert decode.pod_template["spec"]["volumes"] == [
        {"name": "models", "persistentVolumeClaim": {"claimName": "models"}}
    ]
    assert decode.pod_template["spec"]["tolerations"] == [{"operator": "Exists"}]
    assert decode.shared_memory_size == "16Gi"
    assert decode.compilation_cache is not None
    assert decode.compilation_cache.manifest() == {
        "pvcName": "kernels",
        "mountPath": "/root/.cache/vllm",
    }


def test_the_main_container_wins_over_the_service() -> None:
    service: Json = {
        "componentType": "worker",
        "envs": [{"name": "A", "value": "service"}, {"name": "B", "value": "service"}],
        "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
        "livenessProbe": {"periodSeconds": 1},
        "extraPodSpec": {
            "mainContainer": {
                "image": "x",
                "env": [{"name": "B", "value": "main"}, {"name": "C", "value": "main"}],
                "resources": {"limits": {"cpu": "2"}},
                "livenessProbe": {"periodSeconds": 2},
            }
        },
    }
    graph = to_v1beta1(
        alpha(
            {
                "apiVersion": v1alpha1.API_VERSION,
                "kind": "DynamoGraphDeployment",
                "metadata": {"name": "g"},
                "spec": {"services": {"w": service}},
            }
        )
    )
    main = main_of(graph.spec.components[0])
    assert [(e["name"], e["value"]) for e in main["env"]] == [
        ("A", "service"),
        ("B", "main"),
        ("C", "main"),
    ]
    assert main["resources"] == {"limits": {"cpu": "2", "memory": "1Gi"}}
    assert main["livenessProbe"] == {"periodSeconds": 2}


@pytest.mark.parametrize(
    ("kind", "sub", "expected"),
    [
        ("frontend", None, "frontend"),
        ("worker", None, "worker"),
        ("worker", "prefill", "prefill"),
        ("worker", "decode", "decode"),
        ("main", "decode", "decode"),
        (None, "prefill", "prefill"),
        ("decode", None, "decode"),
        ("planner", None, "planner"),
        ("epp", None, "epp"),
        ("main", None, None),
        ("default", None, None),
        ("", None, None),
        (None, None, None),
    ],
)
def test_types(kind: str | None, sub: str | None, expected: str | None) -> None:
    service = {"componentType": kind, "subComponentType": sub}
    graph = to_v1beta1(
        alpha(
            {
                "apiVersion": v1alpha1.API_VERSION,
                "kind": "DynamoGraphDeployment",
                "metadata": {"name": "g"},
                "spec": {"services": {"x": service}},
            }
        )
    )
    assert graph.spec.components[0].type == expected


def test_a_change_of_replicas_keeps_the_form(v1alpha1_text: str) -> None:
    original = yaml.safe_load(v1alpha1_text)
    stored = to_v1beta1(alpha(original))
    stored.spec.components[1].replicas = 7
    back = to_v1alpha1(stored).manifest()
    expected = alpha(original).manifest()
    expected["spec"]["services"]["Decode"]["replicas"] = 7
    assert back == expected


def test_a_changed_component_keeps_what_only_v1alpha1_can_say(v1alpha1_text: str) -> None:
    stored = to_v1beta1(alpha(yaml.safe_load(v1alpha1_text))).manifest()
    stored["spec"]["components"][0]["podTemplate"]["spec"]["containers"][0]["image"] = "other:2"
    back = to_v1alpha1(beta(stored)).manifest()
    service = back["spec"]["services"]["Frontend"]
    assert service["ingress"] == {"enabled": True, "host": "chat.example.org"}
    assert service["extraPodSpec"]["mainContainer"]["image"] == "other:2"
    assert back["spec"]["pvcs"][0]["name"] == "models"
    again = to_v1beta1(alpha(back))
    assert main_of(again.spec.components[0])["image"] == "other:2"
    assert said_in_v1alpha1(again).services["Frontend"].ingress is not None


def test_a_changed_service_keeps_what_only_v1beta1_can_say(v1beta1_text: str) -> None:
    graph = yaml.safe_load(v1beta1_text)
    component = graph["spec"]["components"][0]
    component["frontendSidecar"] = "logger"
    component["experimental"] = {"grove": {"forceScalingGroup": True}}
    served = to_v1alpha1(beta(graph)).manifest()
    served["spec"]["services"]["Frontend"]["envs"] = [{"name": "A", "value": "b"}]
    stored = to_v1beta1(alpha(served)).spec.components[0]
    assert stored.frontend_sidecar == "logger"
    assert stored.experimental is not None
    assert stored.experimental.grove is not None
    assert main_of(stored)["env"] == [{"name": "A", "value": "b"}]


def test_defaults_filled_in_between_change_nothing(v1alpha1_text: str) -> None:
    original = yaml.safe_load(v1alpha1_text)
    original["spec"]["services"]["Decode"]["checkpoint"] = {"enabled": True}
    stored = to_v1beta1(alpha(original)).manifest()
    stored["spec"]["components"][1]["experimental"]["checkpoint"].update(
        deletionPolicy="Delete", startupPolicy="Immediate", targetContainerName="main"
    )
    assert to_v1alpha1(beta(stored)).manifest() == alpha(original).manifest()


def test_an_edit_leaves_everything_else_in_its_place() -> None:
    """Server-side apply tracks fields: one that moves counts as removed."""
    service: Json = {
        "componentType": "main",
        "subComponentType": "decode",
        "replicas": 1,
        "envs": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
        "envFromSecret": "token",
        "resources": {
            "limits": {
                "cpu": "4",
                "gpu": "2",
                "gpuType": "amd.com/gpu",
                "custom": {"rdma/ib": "1"},
            },
            "requests": {"memory": "1Gi"},
        },
        "livenessProbe": {"periodSeconds": 3},
        "volumeMounts": [
            {"name": "models", "mountPoint": "/models"},
            {"name": "kernels", "mountPoint": "/k", "useAsCompilationCache": True},
        ],
        "annotations": {"a": "1"},
        "labels": {"b": "2"},
        "extraPodMetadata": {"labels": {"c": "3"}},
        "sharedMemory": {"size": "1Gi"},
        "scalingAdapter": {"enabled": False},
        "autoscaling": {"enabled": True},
        "frontendSidecar": {"image": "side", "envFromSecret": "token", "envs": [{"name": "S"}]},
        "extraPodSpec": {"mainContainer": {"image": "x", "env": [{"name": "C", "value": "3"}]}},
    }
    manifest: Json = {
        "apiVersion": v1alpha1.API_VERSION,
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "g"},
        "spec": {"services": {"w": service}},
    }
    stored = convert(manifest, v1beta1.API_VERSION)
    pod = stored["spec"]["components"][0]["podTemplate"]
    (main,) = [c for c in pod["spec"]["containers"] if c["name"] == "main"]
    main["env"] = [e for e in main["env"] if e["name"] != "B"] + [{"name": "D", "value": "4"}]
    main["resources"]["limits"]["cpu"] = "8"
    main["livenessProbe"] = {"periodSeconds": 5}
    pod["metadata"]["labels"]["b"] = "9"
    back = convert(stored, v1alpha1.API_VERSION)["spec"]["services"]["w"]
    limits = {**service["resources"]["limits"], "cpu": "8"}
    assert back == {
        **service,
        "envs": service["envs"][:1],
        "resources": {**service["resources"], "limits": limits},
        "livenessProbe": {"periodSeconds": 5},
        "labels": {"b": "9"},
        "extraPodSpec": {
            "mainContainer": {
                "image": "x",
                "env": [{"name": "C", "value": "3"}, {"name": "D", "value": "4"}],
            }
        },
    }


def test_what_only_v1alpha1_says_can_be_asked_for(v1alpha1_text: str, v1beta1_text: str) -> None:
    said = said_in_v1alpha1(to_v1beta1(alpha(yaml.safe_load(v1alpha1_text))))
    assert [(claim.name, claim.size) for claim in said.pvcs] == [("models", "100Gi")]
    ingress = said.services["Frontend"].ingress
    assert ingress is not None
    assert ingress.host == "chat.example.org"
    assert said_in_v1alpha1(beta(yaml.safe_load(v1beta1_text))).manifest() == {}


@pytest.mark.parametrize(
    "garbage",
    ["", "[", "[]", '{"spec": 1}', '{"component/Decode": {"object": {"replicas": "x"}}}'],
)
def test_a_spoilt_annotation_is_ignored(v1beta1_text: str, garbage: str) -> None:
    graph = yaml.safe_load(v1beta1_text)
    graph["metadata"]["annotations"] = {SAID_IN_V1ALPHA1: garbage}
    served = to_v1alpha1(beta(graph)).manifest()
    assert served["spec"]["services"]["decode"]["componentType"] == "worker"
    del graph["metadata"]["annotations"]
    assert to_v1beta1(alpha(served)).manifest() == beta(graph).manifest()


def test_status() -> None:
    status: Json = {
        "state": "successful",
        "services": {
            "A": {
                "componentKind": "Deployment",
                "componentName": "g-a",
                "componentNames": ["g-a"],
                "replicas": 2,
                "updatedReplicas": 2,
            },
            "B": {
                "componentKind": "Deployment",
                "componentName": "g-b",
                "replicas": 1,
                "updatedReplicas": 0,
            },
        },
        "rollingUpdate": {"phase": "InProgress", "updatedServices": ["A"]},
    }
    served = {
        "apiVersion": v1alpha1.API_VERSION,
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "g"},
        "status": status,
    }
    stored = convert(served, v1beta1.API_VERSION)
    assert stored["status"]["components"]["B"]["componentNames"] == ["g-b"]
    assert stored["status"]["rollingUpdate"]["updatedComponents"] == ["A"]
    assert convert(stored, v1alpha1.API_VERSION) == served


def test_convert_refuses_what_it_does_not_know(v1beta1_text: str) -> None:
    with pytest.raises(ValueError, match="no conversion of ConfigMap from v1"):
        convert({"apiVersion": "v1", "kind": "ConfigMap"}, v1beta1.API_VERSION)
    with pytest.raises(ValueError, match=r"to nvidia\.com/v2"):
        convert(yaml.safe_load(v1beta1_text), "nvidia.com/v2")


SERVER_METADATA: Json = {
    "name": "chat",
    "namespace": "team",
    "uid": "0c1d",
    "resourceVersion": "7",
    "generation": 2,
    "creationTimestamp": "2026-01-01T00:00:00Z",
    "labels": {"team": "search"},
    "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
    "finalizers": ["example.org/hold"],
    "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}, "subresource": None}],
    "somethingNewer": {"of": ["a", "later", "Kubernetes"]},
}


@pytest.mark.parametrize("version", ["v1beta1", "v1alpha1"])
def test_convert_touches_nothing_of_the_metadata_but_annotations(
    version: str, v1beta1_text: str, v1alpha1_text: str
) -> None:
    manifest = yaml.safe_load(v1beta1_text if version == "v1beta1" else v1alpha1_text)
    manifest["metadata"] = SERVER_METADATA
    other = "nvidia.com/v1alpha1" if version == "v1beta1" else "nvidia.com/v1beta1"
    there = convert(manifest, other)
    annotations = there["metadata"]["annotations"]
    assert annotations.items() >= SERVER_METADATA["annotations"].items()
    assert {**there["metadata"], "annotations": {}} == {**SERVER_METADATA, "annotations": {}}
    assert convert(there, f"nvidia.com/{version}") == {
        **without_null(manifest),
        "metadata": SERVER_METADATA,
    }


def test_convert_keeps_fields_that_only_a_newer_crd_knows(v1beta1_text: str) -> None:
    """While an upgrade rolls out, an older webhook converts what a newer CRD has let in."""
    stored = yaml.safe_load(v1beta1_text)
    stored["spec"]["novelty"] = {"x": 1}
    stored["spec"]["components"][1]["roles"] = [{"name": "leader"}]
    stored["spec"]["components"][1]["multinode"]["elastic"] = True
    stored["status"] = {"state": "pending", "mood": "good"}
    served = convert(stored, v1alpha1.API_VERSION)
    served["spec"]["services"]["Frontend"]["replicas"] = 3
    back = convert(served, v1beta1.API_VERSION)
    stored["spec"]["components"][0]["replicas"] = 3
    assert back == stored


def test_convert_takes_what_a_rule_would_refuse_today(v1beta1_text: str) -> None:
    stored = yaml.safe_load(v1beta1_text)
    stored["spec"]["components"][0]["frontendSidecar"] = "missing"
    stored["spec"]["env"][0]["valueFrom"] = {"fieldRef": {"fieldPath": "status.podIP"}}
    stored["spec"]["restart"] = {"id": "1", "strategy": {"order": ["Frontend"]}}
    served = convert(stored, v1alpha1.API_VERSION)
    assert convert(served, v1beta1.API_VERSION) == stored


def test_convert_prunes_null_but_not_in_opaque_objects(v1beta1_text: str) -> None:
    stored = yaml.safe_load(v1beta1_text)
    stored["spec"]["priorityClassName"] = None
    override = {"apiVersion": "grove.io/v1alpha1", "value": {"packDomain": None}}
    stored["spec"]["components"][0]["providerOverride"] = override
    back = convert(convert(stored, v1alpha1.API_VERSION), v1beta1.API_VERSION)
    del stored["spec"]["priorityClassName"]
    assert back == stored


def test_convert_names_a_value_that_it_cannot_read(v1beta1_text: str) -> None:
    stored = yaml.safe_load(v1beta1_text)
    stored["spec"]["components"] = {"Frontend": {}}
    with pytest.raises(ValidationError, match=r"spec\.components"):
        convert(stored, v1alpha1.API_VERSION)


def test_all_graphs_of_the_corpus_come_back_equal(corpora: Path) -> None:
    versions = {v1alpha1.API_VERSION: 0, v1beta1.API_VERSION: 0}
    for file in sorted((corpora / "manifests").glob("*.y*ml")):
        for document in load_documents(file):
            if not document.is_graph:
                continue
            graph = parse(document).manifest()
            versions[document.api_version] += 1
            (other,) = versions.keys() - {document.api_version}
            there = convert(graph, other)
            assert convert(there, document.api_version) == graph, file.name
    assert min(versions.values()) >= 40


# --- properties -----------------------------------------------------------------------------------

dns_names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?", fullmatch=True)
names = st.text("abcXY0", min_size=1, max_size=4)
labels = st.dictionaries(names, names, min_size=1, max_size=2)
sizes = st.sampled_from(["1", "500m", "16Gi", "2e3"])
envs = st.lists(
    st.fixed_dictionaries({"name": names}, optional={"value": names}),
    min_size=1,
    max_size=3,
    unique_by=lambda env: env["name"],
)
probes = st.fixed_dictionaries({"periodSeconds": st.integers(1, 60)})


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({}, optional=fields)


container_fields = {
    "image": names,
    "command": st.lists(names, max_size=2),
    "args": st.lists(names, max_size=2),
    "env": envs,
    "resources": optional(
        limits=st.dictionaries(names, sizes), requests=st.dictionaries(names, sizes)
    ),
    "livenessProbe": probes,
    "volumeMounts": st.lists(
        st.fixed_dictionaries({"name": names, "mountPath": names}), max_size=2
    ),
    "imagePullPolicy": names,
}
sidecars = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["main", "proxy", "logger", "sidecar-frontend"]), "image": names},
        optional={"env": envs},
    ),
    max_size=3,
    unique_by=lambda container: container["name"],
)
pod_fields = {
    "containers": sidecars,
    "initContainers": st.lists(
        st.fixed_dictionaries({"name": st.just("init"), "image": names}), max_size=1
    ),
    "nodeSelector": labels,
    "volumes": st.lists(st.fixed_dictionaries({"name": names}), max_size=2),
    "hostIPC": st.booleans(),
}
resources = optional(
    cpu=sizes, memory=sizes, gpu=sizes, gpuType=names, custom=st.dictionaries(names, sizes)
)
plain = {
    "replicas": st.integers(1, 9),
    "minAvailable": st.just(1),
    "globalDynamoNamespace": st.booleans(),
    "runtimeVersionOverride": st.just("1.6.1"),
    "multinode": optional(nodeCount=st.integers(2, 4)),
    "modelRef": st.fixed_dictionaries({"name": names}),
    "topologyConstraint": st.just({"packDomain": "rack"}),
    "providerOverride": st.fixed_dictionaries(
        {"apiVersion": names, "value": st.dictionaries(names, st.none() | names)}
    ),
}
services = optional(
    **plain,
    componentType=st.sampled_from(v1alpha1.SERVICE_TYPES),
    subComponentType=st.sampled_from(v1alpha1.SUB_TYPES),
    serviceName=names,
    dynamoNamespace=names,
    resources=optional(limits=resources, requests=resources),
    envs=envs,
    envFromSecret=names | st.just(""),
    volumeMounts=st.lists(
        st.fixed_dictionaries(
            {"name": names},
            optional={"mountPoint": names | st.just(""), "useAsCompilationCache": st.booleans()},
        ),
        max_size=3,
    ),
    livenessProbe=probes,
    readinessProbe=probes,
    sharedMemory=st.sampled_from(
        [{"size": "8Gi"}, {"disabled": True}, {"size": "1Gi", "disabled": True}]
    ),
    annotations=labels,
    labels=labels,
    extraPodMetadata=optional(annotations=labels, labels=labels),
    extraPodSpec=optional(**pod_fields, mainContainer=optional(**container_fields)),
    scalingAdapter=optional(enabled=st.booleans()),
    autoscaling=optional(enabled=st.booleans(), minReplicas=st.integers(0, 3)),
    ingress=optional(enabled=st.booleans(), host=names, tls=optional(secretName=names)),
    eppConfig=optional(
        configMapRef=st.fixed_dictionaries({"key": names}),
        config=st.just({"plugins": [], "schedulingProfiles": []}),
    ),
    frontendSidecar=st.fixed_dictionaries(
        {"image": names}, optional={"envs": envs, "envFromSecret": names}
    ),
    checkpoint=optional(enabled=st.booleans(), checkpointRef=names),
    failover=st.fixed_dictionaries(
        {"enabled": st.booleans()},
        optional={"mode": st.just("interPod"), "numShadows": st.integers(1, 3)},
    ),
    gpuMemoryService=st.fixed_dictionaries(
        {"enabled": st.booleans()},
        optional={"mode": st.sampled_from(["intraPod", "interPod"]), "deviceClassName": names},
    ),
)
parts = st.dictionaries(
    st.sampled_from(["Zeta", "alpha", "Mid-1", "b"]), services, min_size=1, max_size=3
)


def one_picker(graph_services: Json) -> Json:
    seen = False
    for service in graph_services.values():
        if service.get("componentType") == "epp":
            if seen:
                service["componentType"] = "worker"
            seen = True
    return graph_services


shared_spec = {
    "backendFramework": st.sampled_from(["vllm", "sglang"]),
    "annotations": labels,
    "labels": labels,
    "priorityClassName": names,
    "restart": st.fixed_dictionaries({"id": names}),
    "experimental": st.just({"kvTransferPolicy": {"domain": "rack", "labelKey": "x"}}),
}
metadata = st.fixed_dictionaries(
    {"name": st.just("g")}, optional={"annotations": labels, "labels": labels}
)
alpha_graphs = st.fixed_dictionaries(
    {
        "apiVersion": st.just(v1alpha1.API_VERSION),
        "kind": st.just("DynamoGraphDeployment"),
        "metadata": metadata,
        "spec": optional(
            **shared_spec,
            envs=envs,
            pvcs=st.lists(st.fixed_dictionaries({"name": dns_names}), max_size=2),
            topologyConstraint=st.fixed_dictionaries({"topologyProfile": names}),
            services=parts.map(one_picker),
        ),
    }
)


def existing_sidecar(component: Json) -> Json:
    spec = component.get("podTemplate", {}).get("spec", {})
    if component.get("frontendSidecar") not in [c["name"] for c in spec.get("containers", [])]:
        return {key: value for key, value in component.items() if key != "frontendSidecar"}
    return component


components = st.fixed_dictionaries(
    {"name": st.sampled_from(["Zeta", "alpha", "Mid-1", "b"])},
    optional={
        **plain,
        "type": st.sampled_from(["frontend", "worker", "prefill", "decode", "planner"]),
        "podTemplate": optional(
            metadata=optional(annotations=labels, labels=labels, name=names),
            spec=optional(**pod_fields),
        ),
        "scalingAdapter": st.just({}),
        "sharedMemorySize": st.sampled_from(["8Gi", "0", 0, 4096, "-1Gi"]),
        "compilationCache": st.fixed_dictionaries(
            {"pvcName": names}, optional={"mountPath": names}
        ),
        "frontendSidecar": st.just("proxy"),
        "experimental": optional(
            checkpoint=st.fixed_dictionaries({"enabled": st.booleans()}),
            failover=optional(mode=st.just("InterPod"), numShadows=st.just(1)),
            gpuMemoryService=optional(mode=st.sampled_from(["IntraPod", "InterPod"])),
            grove=optional(forceScalingGroup=st.booleans()),
        ),
    },
).map(existing_sidecar)
beta_graphs = st.fixed_dictionaries(
    {
        "apiVersion": st.just(v1beta1.API_VERSION),
        "kind": st.just("DynamoGraphDeployment"),
        "metadata": metadata,
        "spec": optional(
            **shared_spec,
            env=envs,
            topologyConstraint=st.fixed_dictionaries({"clusterTopologyName": names}),
            components=st.lists(components, max_size=3, unique_by=lambda c: c["name"]),
        ),
    }
)


@given(alpha_graphs)
def test_v1alpha1_comes_back_equal(manifest: Json) -> None:
    graph = alpha(manifest)
    there = to_v1beta1(graph)
    assert SAID_IN_V1BETA1 not in there.metadata.annotations
    assert to_v1alpha1(there).manifest() == graph.manifest()


@given(beta_graphs)
def test_v1beta1_comes_back_equal(manifest: Json) -> None:
    graph = beta(manifest)
    there = to_v1alpha1(graph)
    assert SAID_IN_V1ALPHA1 not in there.metadata.annotations
    assert to_v1beta1(there).manifest() == graph.manifest()


@given(alpha_graphs, beta_graphs)
def test_a_later_change_does_not_bring_the_past_back(manifest: Json, other: Json) -> None:
    """A v1beta1 author replaces the spec under the annotation: exactly that spec comes back."""
    stored = to_v1beta1(alpha(manifest)).manifest()
    stored["spec"] = other["spec"]
    graph = beta(stored)
    served = to_v1alpha1(graph)
    assert to_v1beta1(served).spec.manifest() == graph.spec.manifest()


@given(alpha_graphs, alpha_graphs)
def test_any_edit_says_the_same_in_any_form(manifest: Json, other: Json) -> None:
    """A service that keeps to another one's form still says just what it is to say."""
    forms = list(manifest["spec"].get("services", {}).values())
    edits = [without_null(s) for s in other["spec"].get("services", {}).values()]
    for original, edited in itertools.product(map(without_null, forms), edits):
        component = component_of(edited)
        plain = component_of(service_of(component))
        assert component_of(service_like(component, original)) in (plain, component)
        assert component_of(service_like(component, edited)) == component


def test_a_sidecar_that_is_written_out_as_well_keeps_its_place() -> None:
    """`frontendSidecar` rules over a container of its name, wherever that stands."""
    written = [{"name": "sidecar-frontend", "image": "idle"}, {"name": "logger", "image": "l"}]
    service = {"frontendSidecar": {"image": "f"}, "extraPodSpec": {"containers": written}}
    component = component_of(service)
    images = {c["name"]: c["image"] for c in component["podTemplate"]["spec"]["containers"]}
    assert images == {"sidecar-frontend": "f", "logger": "l"}
    again = service_like(component, service)
    assert again == service
    assert component_of(again) == component


@given(st.integers(0, 9), optional(selector=names, replicas=st.integers(0, 9)))
def test_adapters_come_back_equal(replicas: int, status: Json) -> None:
    served = v1alpha1.DynamoGraphDeploymentScalingAdapter.model_validate(
        {
            "metadata": {"name": "g-decode"},
            "spec": {"replicas": replicas, "dgdRef": {"name": "g", "serviceName": "decode"}},
            "status": status,
        }
    )
    stored = adapter_to_v1beta1(served)
    assert stored.spec.dgd_ref.component_name == "decode"
    assert stored.status is not None
    assert stored.status.replicas == status.get("replicas", 0)
    assert adapter_to_v1alpha1(stored).manifest() == served.manifest()


def test_the_annotation_is_json_and_small(v1alpha1_text: str) -> None:
    stored = to_v1beta1(alpha(yaml.safe_load(v1alpha1_text)))
    text = stored.metadata.annotations[SAID_IN_V1ALPHA1]
    assert set(json.loads(text)) == {"spec", "component/Frontend", "component/Decode", "order"}
    assert len(text) < 2 * len(v1alpha1_text)
