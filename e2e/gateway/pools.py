"""InferencePools with our picker, as manifests: what somebody applies beside existing pods."""

from __future__ import annotations

from typing import Any

from dynamo_runtime import __version__

from e2e.cluster.fixtures import Gateway

Manifest = dict[str, Any]

IMAGE = f"dynamo-platform/epp:{__version__}"
API_GROUP = "inference.networking.k8s.io"
STATUS_PORT = 9090


def pool(
    name: str, port: int = 8000, *flags: str, failure_mode: str = "FailClose", pickers: int = 1
) -> list[Manifest]:
    """A pool of the pods with the label `app: NAME`, its picker `NAME-epp` with further `flags`,
    and the rights that it needs. The processes of a pod are one namespace, so that the picker can
    be killed from inside."""
    picker = f"{name}-epp"
    labels = {"app": picker}
    reads = [
        {"apiGroups": [API_GROUP], "resources": ["inferencepools"]},
        {"apiGroups": [""], "resources": ["pods"]},
    ]
    container = {
        "name": "epp",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": ["dynamo", "epp", "--pool-name", name, *flags],
        "env": [
            {"name": "NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}
        ],
        "readinessProbe": {"grpc": {"port": 9003}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
    }
    return [
        {
            "apiVersion": f"{API_GROUP}/v1",
            "kind": "InferencePool",
            "metadata": {"name": name},
            "spec": {
                "selector": {"matchLabels": {"app": name}},
                "targetPorts": [{"number": port}],
                "endpointPickerRef": {
                    "name": picker,
                    "port": {"number": 9002},
                    "failureMode": failure_mode,
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": picker},
            "spec": {"selector": labels, "ports": [{"port": 9002, "appProtocol": "http2"}]},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": picker}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": picker},
            "rules": [{**rule, "verbs": ["get", "list", "watch"]} for rule in reads],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": picker},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Role",
                "name": picker,
            },
            "subjects": [{"kind": "ServiceAccount", "name": picker}],
        },
        deployment(
            picker, container, pickers, serviceAccountName=picker, shareProcessNamespace=True
        ),
    ]


def hostname(namespace: str) -> str:
    """The host that a namespace's route is for."""
    return f"{namespace}.example.com"


def behind(gateway: Gateway, name: str, namespace: str) -> list[Manifest]:
    """What puts a pool behind a Gateway of Istio's: the route, and TLS to the picker."""
    backend = {"group": API_GROUP, "kind": "InferencePool", "name": name}
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": name},
        "spec": {
            "parentRefs": [{"name": gateway.name, "namespace": gateway.namespace}],
            "hostnames": [hostname(namespace)],
            "rules": [{"backendRefs": [backend]}],
        },
    }
    return [tls_rule(f"{name}-epp", namespace), route]


def tls_rule(service: str, namespace: str) -> Manifest:
    """Makes Istio speak TLS to a Service, without asking who signed its certificate."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": {"name": service, "namespace": namespace},
        "spec": {
            "host": f"{service}.{namespace}.svc.cluster.local",
            "trafficPolicy": {"tls": {"mode": "SIMPLE", "insecureSkipVerify": True}},
            "exportTo": ["*"],
        },
    }


def deployment(
    name: str, container: Manifest, replicas: int = 1, *, app: str = "", **pod: Any
) -> Manifest:
    """A Deployment of one container, labelled `deployment: NAME` and `app: APP` (by default its
    name too); `pod`: further fields of its pods."""
    labels = {"app": app or name, "deployment": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [container], **pod},
            },
        },
    }


def engines(name: str, replicas: int, *flags: str, app: str = "") -> Manifest:
    """Simulated engines without anything of ours around them, as stock vLLM pods are.

    A pod that ends is left alone for two seconds, as people configure it: until every gateway has
    heard of it. Its processes are one namespace, so that the engine can be killed from inside.
    """
    container = {
        "name": "engine",
        "image": f"dynamo-platform/worker:{__version__}",
        "imagePullPolicy": "Never",
        "command": ["python", "-m", "dynamo_workers.sim", "--served-model-name", "tiny"],
        "args": ["--shutdown-timeout", "20", "--log-level", "warning", *flags],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1},
        "lifecycle": {"preStop": {"sleep": {"seconds": 2}}},
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
    }
    return deployment(
        name,
        container,
        replicas,
        app=app,
        terminationGracePeriodSeconds=30,
        shareProcessNamespace=True,
    )
