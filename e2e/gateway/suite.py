"""The inference extension's conformance suite, run with a picker of our choice.

The suite is a Go program that is built out of the extension's own module (`suite/`). Its tests stay
as they are; what is replaced are base manifests, by an option of the suite: the containers that run
the reference picker, and the names of images that are not pulled here but built.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from e2e.cluster import Cluster, settings
from e2e.gateway import pools

BACKENDS, GATEWAYS = "inference-conformance-app-backend", "inference-conformance-infra"
"""Namespaces of the base manifests."""
SUITE_S = 2400.0
_RESULT = re.compile(r"^    --- (PASS|FAIL|SKIP): TestConformance/(\w+) \((\d+\.\d+)s\)", re.M)

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Picker:
    """The container that takes the reference picker's place."""

    image: str
    command: tuple[str, ...] = ()
    """Instead of the image's entrypoint."""
    arguments: tuple[str, ...] = ()
    """After those that the suite gives."""


@dataclass(frozen=True, slots=True)
class Result:
    """One test of the suite."""

    name: str
    passed: bool
    seconds: float


def manifests(text: str, picker: Picker) -> list[Manifest]:
    """The suite's base manifests with another picker, and what makes Istio speak TLS to it.

    Istio speaks plaintext to a picker unless a DestinationRule says otherwise; the suite's pickers
    serve TLS with certificates that nobody signed.
    """
    found: list[Manifest] = [document for document in yaml.safe_load_all(text) if document]
    for document in found:
        if document["kind"] == "Deployment":
            for container in document["spec"]["template"]["spec"]["containers"]:
                _replace(container, picker)
    services = [document for document in found if document["kind"] == "Service"]
    found += [pools.tls_rule(service["metadata"]["name"], BACKENDS) for service in services]
    return found + standing(
        services[0]["metadata"]["name"], ("conformance-primary", "conformance-secondary")
    )


def _replace(container: Manifest, picker: Picker) -> None:
    container["imagePullPolicy"] = "Never"
    if container["name"] != "epp":
        container["image"] = settings.ECHO_IMAGE
        return
    container["image"] = picker.image
    if picker.command:
        container["command"] = list(picker.command)
    container["args"] += picker.arguments


def standing(service: str, gateways: tuple[str, ...]) -> list[Manifest]:
    """A pool that is attached to the Gateways all the time, by a path that no test asks for.

    Istio's listeners have the filter that asks pickers only while some pool is attached, and a
    Gateway's first pool sometimes gets its route without its listener being told (a route's and a
    pool's change are worked on side by side, and only the former pushes). Nothing heals that until
    the next change. Tests attach and detach pools one after the other, so each could meet it.
    """
    meta = {"name": "always-attached", "namespace": BACKENDS}
    backend = {"group": pools.API_GROUP, "kind": "InferencePool", "name": meta["name"]}
    path = {"type": "PathPrefix", "value": f"/{meta['name']}"}
    pool = {
        "selector": {"matchLabels": {"app": meta["name"]}},
        "targetPorts": [{"number": 3000}],
        "endpointPickerRef": {"name": service, "port": {"number": 9002}},
    }
    route = {
        "parentRefs": [{"name": name, "namespace": GATEWAYS} for name in gateways],
        "rules": [{"matches": [{"path": path}], "backendRefs": [backend]}],
    }
    return [
        {
            "apiVersion": f"{pools.API_GROUP}/v1",
            "kind": "InferencePool",
            "metadata": meta,
            "spec": pool,
        },
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": meta,
            "spec": route,
        },
    ]


def run(cluster: Cluster, picker: Picker, folder: Path, *flags: str) -> tuple[list[Result], str]:
    """Run the suite with further `flags` of its own: what came of each test, and all it said.

    `folder` gets the base manifests, the log, and the suite's own report (`report.yaml`).
    """
    text = (cluster.layout.manifests / "gateway-conformance.yaml").read_text()
    (folder / "base.yaml").write_text(yaml.safe_dump_all(manifests(text, picker)))
    command = [
        str(cluster.layout.bin / "gateway-conformance.test"),
        *("-test.v", f"-test.timeout={SUITE_S:g}s", "-test.run=TestConformance"),
        *("-gateway-class=istio", "-cleanup-base-resources=false"),
        *("-organization=local", "-project=istio-with-dynamo-epp", "-contact=none"),
        *("-url=none", f"-version={settings.ISTIO_RELEASE}"),
        f"-report-output={folder / 'report.yaml'}",
        *flags,
    ]
    env = {
        **os.environ,
        "KUBECONFIG": str(cluster.kubeconfig),
        "BASE_MANIFESTS": str(folder),
        "NO_PROXY": "*",
    }
    with (folder / "suite.log").open("w") as log:
        subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=log, check=False)
    said = (folder / "suite.log").read_text()
    return list(results(said)), said


def results(log: str) -> Iterator[Result]:
    """What a run says of its tests."""
    for verdict, name, seconds in _RESULT.findall(log):
        if verdict != "SKIP":
            yield Result(name, verdict == "PASS", float(seconds))


def remove(cluster: Cluster) -> None:
    """Take away what the suite left, without waiting for its pods to end."""
    cluster.kubectl(
        *("delete", "namespace", BACKENDS, GATEWAYS, "--ignore-not-found", "--wait=false")
    )
