"""The manifests that people are told to apply: their parts fit, and so do the rights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from dynamo_cli import epp_command
from dynamo_epp.models.watch import OBJECTIVES, REWRITES
from dynamo_epp.server.health import LIVENESS, READINESS
from dynamo_runtime.discovery import PoolSpec
from dynamo_runtime.kubernetes.resources import EVENTS, INFERENCE_POOLS, PODS

EXAMPLE = Path(__file__).parents[2] / "examples" / "inference-pool.yaml"
GUIDE = Path(__file__).parents[2] / "docs" / "gateway.md"


def manifests() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all(EXAMPLE.read_text())}


def test_the_parts_name_each_other() -> None:
    found = manifests()
    pool, service, deployment = found["InferencePool"], found["Service"], found["Deployment"]
    PoolSpec.of(pool)
    reference = pool["spec"]["endpointPickerRef"]
    assert reference["name"] == service["metadata"]["name"]
    assert reference["port"]["number"] in [port["port"] for port in service["spec"]["ports"]]
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    assert container["args"][:2] == ["--pool-name", pool["metadata"]["name"]]
    backend = found["HTTPRoute"]["spec"]["rules"][0]["backendRefs"][0]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["service"] in (LIVENESS, *READINESS)


def test_the_rights_are_those_that_are_used() -> None:
    rules = manifests()["Role"]["rules"]
    granted = {(g, r) for rule in rules for g in rule["apiGroups"] for r in rule["resources"]}
    used = (PODS, INFERENCE_POOLS, EVENTS, *OBJECTIVES, *REWRITES)
    assert granted == {(kind.group, kind.plural) for kind in used}
    *read, told = rules
    assert (told["resources"], told["verbs"]) == (["events"], ["create"])
    assert all(rule["verbs"] == ["get", "list", "watch"] for rule in read)


def test_the_guide_names_flags_that_exist() -> None:
    text = GUIDE.read_text()
    for name in ("--any-path", "--fallback-endpoints", "--drain-accept", "--conformance-headers"):
        assert name in text
    for name in epp_command.REFUSED:
        assert name in text or name.startswith("--metrics-c")
