"""The pods of operator and webhook: non-root, without a writable root, with probes."""

from __future__ import annotations

from typing import Any

from dynamo_operator.install.rights import labels
from dynamo_operator.install.settings import CERTIFICATE, OPERATOR, WEBHOOK, Installation

Json = dict[str, Any]

STATUS_PORT = 9090
WEBHOOK_PORT = 9443
CERTIFICATES = "/certificates"


def operator(installation: Installation) -> Json:
    """One leads, the others wait with their caches filled."""
    arguments = ["operator", "run", *_images(installation)]
    for namespace in installation.watch_namespaces:
        arguments += ["--watch-namespace", namespace]
    for namespace in installation.pull_secrets:
        arguments += ["--pull-secrets", namespace]
    container = _container(
        installation,
        OPERATOR,
        arguments,
        resources=_resources("100m", "256Mi", "1Gi"),
    )
    return _deployment(installation, OPERATOR, installation.replicas, container, [])


def webhook(installation: Installation) -> list[Json]:
    """Two pods apart from each other, their budget, and the Service that the API server calls."""
    arguments = ["operator", "webhook", *_images(installation)]
    if installation.restricted:
        for namespace in installation.watch_namespaces:
            arguments += ["--watch-namespace", namespace]
        arguments += ["--configuration", installation.cluster_name(OPERATOR)]
    else:
        arguments.append("--install-crds")
    volumes: list[Json] = []
    mounts: list[Json] = []
    if installation.cert_manager:
        arguments += ["--cert-dir", CERTIFICATES]
        volumes = [{"name": "certificates", "secret": {"secretName": CERTIFICATE}}]
        mounts = [{"name": "certificates", "mountPath": CERTIFICATES, "readOnly": True}]
    container = _container(
        installation,
        WEBHOOK,
        arguments,
        resources=_resources("50m", "192Mi", "768Mi"),
        ports=[{"name": "webhook", "containerPort": WEBHOOK_PORT}],
        mounts=mounts,
    )
    metadata = _metadata(installation, WEBHOOK)
    selector = _selector(WEBHOOK)
    return [
        _deployment(installation, WEBHOOK, 2, container, volumes),
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata,
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector}},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "selector": selector,
                "ports": [{"name": "webhook", "port": 443, "targetPort": "webhook"}],
            },
        },
    ]


def certificate(installation: Installation) -> list[Json]:
    """cert-manager's objects: an issuer that signs for itself, and the webhook's certificate."""
    metadata = _metadata(installation, WEBHOOK)
    service = f"{WEBHOOK}.{installation.namespace}.svc"
    return [
        {
            "apiVersion": "cert-manager.io/v1",
            "kind": "Issuer",
            "metadata": metadata,
            "spec": {"selfSigned": {}},
        },
        {
            "apiVersion": "cert-manager.io/v1",
            "kind": "Certificate",
            "metadata": metadata,
            "spec": {
                "secretName": CERTIFICATE,
                "dnsNames": [service, f"{service}.cluster.local"],
                "issuerRef": {"kind": "Issuer", "name": WEBHOOK},
                "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
            },
        },
    ]


def _images(installation: Installation) -> list[str]:
    return [
        "--image-prefix",
        installation.image_prefix,
        "--image-tag",
        installation.image_tag,
        *(word for mapping in installation.map_images for word in ("--map-image", mapping)),
    ]


def _metadata(installation: Installation, name: str) -> Json:
    return {"name": name, "namespace": installation.namespace, "labels": labels(name)}


def _selector(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name}


def _resources(cpu: str, memory: str, most: str) -> Json:
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": most}}


def _container(
    installation: Installation,
    name: str,
    arguments: list[str],
    *,
    resources: Json,
    ports: list[Json] | None = None,
    mounts: list[Json] | None = None,
) -> Json:
    def field(path: str) -> Json:
        return {"valueFrom": {"fieldRef": {"fieldPath": path}}}

    return {
        "name": name.removeprefix("dynamo-operator-").removeprefix("dynamo-"),
        "image": installation.image,
        "command": ["dynamo"],
        "args": arguments,
        "env": [
            {"name": "POD_NAME", **field("metadata.name")},
            {"name": "POD_NAMESPACE", **field("metadata.namespace")},
        ],
        "ports": [*(ports or []), {"name": "status", "containerPort": STATUS_PORT}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "status"}, "periodSeconds": 5},
        "livenessProbe": {
            "httpGet": {"path": "/live", "port": "status"},
            "initialDelaySeconds": 10,
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [*(mounts or []), {"name": "tmp", "mountPath": "/tmp"}],
    }


def _deployment(
    installation: Installation, name: str, replicas: int, container: Json, volumes: list[Json]
) -> Json:
    selector = _selector(name)
    elsewhere = {
        "weight": 100,
        "podAffinityTerm": {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": selector},
        },
    }
    apart = {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [elsewhere]}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(installation, name),
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": selector},
            "template": {
                "metadata": {"labels": labels(name)},
                "spec": {
                    "serviceAccountName": name,
                    "affinity": apart,
                    "containers": [container],
                    "securityContext": {
                        "runAsNonRoot": True,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "terminationGracePeriodSeconds": 30,
                    # In memory: the webhook's key lies there for an instant.
                    "volumes": [*volumes, {"name": "tmp", "emptyDir": {"medium": "Memory"}}],
                },
            },
        },
    }
