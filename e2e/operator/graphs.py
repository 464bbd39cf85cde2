"""The graphs that these tests run: small, with a simulated engine, several of them on two cores."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

MODEL = "tiny"
CPU = {"frontend": "200m", "epp": "100m", "worker": "50m"}
"""What each image asks for: its weight where all of them share two cores."""
DRAIN_S = 60
"""Limit for running requests when a pod ends: these engines answer within a second or two."""


def container(image: str, args: list[str] | None = None, **env: str) -> Json:
    """A `main` container of one of our images."""
    main: Json = {
        "name": "main",
        "image": f"dynamo-platform/{image}",
        "resources": {"requests": {"cpu": CPU[image], "memory": "64Mi"}},
    }
    if args is not None:
        main["args"] = args
    variables = {"DYN_DRAIN_SECONDS": str(DRAIN_S), **env}
    main["env"] = [{"name": name, "value": value} for name, value in variables.items()]
    return main


def component(name: str, type: str, main: Json, replicas: int = 1, **fields: Any) -> Json:
    """A component whose pods are `main`."""
    pod = {"spec": {"containers": [main]}}
    return {"name": name, "type": type, "replicas": replicas, "podTemplate": pod, **fields}


def frontend(replicas: int = 1, **env: str) -> Json:
    """Envoy and picker; it tells on each answer how the worker was chosen."""
    return component(
        "Frontend", "frontend", container("frontend", DYN_DECISION_HEADER="true", **env), replicas
    )


def picker(replicas: int = 1, **env: str) -> Json:
    """A picker for Gateways of others; it tells on each answer how the worker was chosen."""
    main = container("epp", DYN_DECISION_HEADER="true", **env)
    return component("Epp", "epp", main, replicas)


def worker(
    replicas: int = 1,
    *flags: str,
    name: str = "Worker",
    type: str = "worker",
    fields: Json | None = None,
    **env: str,
) -> Json:
    """Simulated engines that answer four times as fast as the one they simulate."""
    args = ["--served-model-name", MODEL, "--speed", "4", "--log-level", "warning", *flags]
    return component(name, type, container("worker", args, **env), replicas, **(fields or {}))


def hesitant(worker: Json, seconds: int = 10) -> Json:
    """`worker`, whose pods are not asked before so long whether they are ready: time enough to
    change one's mind about it."""
    main = worker["podTemplate"]["spec"]["containers"][0]
    probe = {"httpGet": {"path": "/ready", "port": "system"}, "periodSeconds": 2}
    main["readinessProbe"] = {**probe, "initialDelaySeconds": seconds}
    return worker


def graph(name: str, *components: Json, annotations: Json | None = None, **spec: Any) -> Json:
    """A DynamoGraphDeployment."""
    return {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": name, "annotations": annotations or {}},
        "spec": {"components": list(components), **spec},
    }


def prefill_and_decode(
    name: str, prefill: int = 1, decode: int = 2, hesitate: bool = False, **env: str
) -> Json:
    """A graph whose workers have roles; both roles change together with `env`."""
    roles = [
        worker(prefill, name="Prefill", type="prefill", **env),
        worker(decode, name="Decode", type="decode", **env),
    ]
    return graph(name, frontend(), *(map(hesitant, roles) if hesitate else roles))
