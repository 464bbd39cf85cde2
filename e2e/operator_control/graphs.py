"""Graphs for tests whose pods run on fake nodes, in the shapes that exercise the operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def component(
    name: str,
    kind: str,
    replicas: int = 1,
    *,
    main: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Json:
    """A component whose pods go to fake nodes. `main`: fields of the main container."""
    return {
        "name": name,
        "type": kind,
        "replicas": replicas,
        "podTemplate": {
            "spec": {
                "nodeSelector": {"type": "kwok"},
                "tolerations": [{"key": "kwok", "operator": "Exists"}],
                "containers": [{"name": "main", **(main or {})}],
            }
        },
        **changes,
    }


def graph(name: str, namespace: str, *components: Json, **metadata: Any) -> Json:
    """A graph of these components; without any, a frontend and two workers."""
    return {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": name, "namespace": namespace, **metadata},
        "spec": {"components": list(components) or aggregated()},
    }


def aggregated(workers: int = 2) -> list[Json]:
    """A frontend, and workers that do everything."""
    return [
        component("Frontend", "frontend"),
        component("Worker", "worker", workers, main={"args": ["--served-model-name=tiny"]}),
    ]


def disaggregated(prefill: int = 1, decode: int = 1) -> list[Json]:
    """A frontend, prefill and decode workers: rolled out by generations."""
    arguments = {"args": ["--served-model-name=tiny"]}
    return [
        component("Frontend", "frontend"),
        component("Prefill", "prefill", prefill, main=arguments),
        component("Decode", "decode", decode, main=arguments),
    ]
