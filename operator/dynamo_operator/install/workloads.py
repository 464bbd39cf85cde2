"""The pods of operator and webhook: non-root, without a writable root, with probes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from dynamo_operator.install.rights import labels
from dynamo_operator.install.settings import CERTIFICATE, OPERATOR, WEBHOOK, Installation

Json = dict[str, Any]

STATUS_PORT = 9090
WEBHOOK_PORT = 9443
CERTIFICATES = "/certificates"
AUTHORITY_LIFE = timedelta(days=3 * 365)
"""Of cert-manager's; the last third of it is for the certificates that it has signed."""


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
    """cert-manager's objects: an authority that signs for itself, and the webhook's certificate by
    it. An authority of its own outlives many certificates, so whom to trust changes rarely."""
    service = f"{WEBHOOK}.{installation.namespace}.svc"
    root, authority = f"{WEBHOOK}-root", f"{WEBHOOK}-ca"
    of_authority = {
        "isCA": True,
        "commonName": authority,
        "duration": _hours(AUTHORITY_LIFE),
        "renewBefore": _hours(AUTHORITY_LIFE / 3),
    }
    of_webhook = {"dnsNames": [service, f"{service}.cluster.local"]}
    return [
        _cert_manager(installation, "Issuer", root, {"selfSigned": {}}),
        _certificate(installation, authority, authority, root, of_authority),
        _cert_manager(installation, "Issuer", WEBHOOK, {"ca": {"secretName": authority}}),
        _certificate(installation, WEBHOOK, CERTIFICATE, WEBHOOK, of_webhook),
    ]


def _certificate(
    installation: Installation, name: str, secret: str, issuer: str, spec: Json
) -> Json:
    common: Json = {
        "secretName": secret,
        "issuerRef": {"kind": "Issuer", "name": issuer},
        "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
    }
    return _cert_manager(installation, "Certificate", name, {**common, **spec})


def _cert_manager(installation: Installation, kind: str, name: str, spec: Json) -> Json:
    metadata = {**_metadata(installation, WEBHOOK), "name": name}
    return {
        "apiVersion": "cert-manager.io/v1",
        "kind": kind,
        "metadata": metadata,
        "spec": spec,
    }


def _hours(time: timedelta) -> str:
    return f"{time // timedelta(hours=1)}h"


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
