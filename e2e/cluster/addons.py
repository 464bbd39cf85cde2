"""What can be put on the cluster beside Kubernetes itself: other projects' manifests, adapted.

They come unchanged out of the projects' own Go modules (`build`). What is changed on the way to the
API server is only what a small machine without a registry needs: images of our own build, one
replica, small requests, probes that don't wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from e2e.cluster import settings

Manifest = dict[str, Any]


def _unchanged(_container: Manifest) -> None:
    pass


def _lws(container: Manifest) -> None:
    container["image"] = settings.LWS_IMAGE
    container["command"] = ["/lws-controller"]


def _istio(container: Manifest) -> None:
    container["image"] = settings.ISTIO_IMAGE


def _metrics_server(container: Manifest) -> None:
    container["image"] = settings.METRICS_SERVER_IMAGE
    container["args"].remove("--metric-resolution=15s")
    container["args"] += ["--metric-resolution=10s", "--kubelet-request-timeout=5s"]
    container["args"].append("--kubelet-insecure-tls")


@dataclass(frozen=True, slots=True)
class Addon:
    """One project's manifests, and the Deployment among them if it has one."""

    file: str
    """Below `manifests` of the cache."""
    namespace: str = ""
    deployment: str = ""
    api_service: str = ""
    """The APIService that answers when it works."""
    adapt: Callable[[Manifest], None] = _unchanged
    """Changes the Deployment's container in place."""
    needs: tuple[str, ...] = ()
    """Add-ons that have to be there before."""
    images: tuple[str, ...] = ()
    """Names below `further_images`; such an add-on is built when it is installed first."""
    component: str = ""
    """Component of the cluster that it wants to run."""
    gateway_class: str = ""
    """The GatewayClass that is accepted when it works."""


ADDONS = {
    "gateway-api": Addon("gateway-api.yaml"),
    "inference-extension": Addon("inference-extension.yaml"),
    "istio": Addon(
        "istio.yaml",
        "istio-system",
        "istiod",
        adapt=_istio,
        needs=("gateway-api", "inference-extension"),
        images=("pilot-discovery", "istio-proxy"),
        component="balancer",
        gateway_class="istio",
    ),
    "lws": Addon("lws.yaml", "lws-system", "lws-controller-manager", adapt=_lws),
    "metrics-server": Addon(
        "metrics-server.yaml",
        "kube-system",
        "metrics-server",
        "v1beta1.metrics.k8s.io",
        adapt=_metrics_server,
    ),
    "pod-monitor": Addon("pod-monitor.yaml"),
}


def manifests(addon: Addon, text: str) -> list[Manifest]:
    """The manifests to apply, out of the file's text."""
    documents: Iterable[Manifest | None] = yaml.safe_load_all(text)
    found = [document for document in documents if document]
    for document in found:
        if document["kind"] == "Deployment":
            _fit(document, addon)
    return found


def _fit(deployment: Manifest, addon: Addon) -> None:
    deployment["spec"]["replicas"] = 1
    pod = deployment["spec"]["template"]["spec"]
    pod.setdefault("securityContext", {})["runAsUser"] = 65532
    (container,) = pod["containers"]
    container["imagePullPolicy"] = "Never"
    container["resources"] = {"requests": {"cpu": "10m", "memory": "32Mi"}}
    container.get("securityContext", {}).pop("runAsUser", None)
    container["readinessProbe"] |= {"initialDelaySeconds": 0, "periodSeconds": 1}
    container["readinessProbe"]["failureThreshold"] = 3
    addon.adapt(container)


def definitions(found: Iterable[Manifest]) -> list[str]:
    """Names of the custom resource definitions among them."""
    kinds = ("CustomResourceDefinition",)
    return [document["metadata"]["name"] for document in found if document["kind"] in kinds]
