"""Labels by which pickers find their engines, as the operator puts them on pods."""

from __future__ import annotations

import hashlib

GRAPH = "nvidia.com/dynamo-graph-deployment-name"
COMPONENT = "nvidia.com/dynamo-component"
ROLE = "nvidia.com/dynamo-component-type"
CLASS = "nvidia.com/dynamo-component-class"
WORKER_HASH = "nvidia.com/dynamo-worker-hash"
GROUP_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"
"""Position of a pod in an engine that spans several: "0" is the one that serves."""

LIMIT = 63


def graph_value(graph: str) -> str:
    """The value of ``GRAPH`` for a graph's name, which may be longer than a label may."""
    if len(graph) <= LIMIT:
        return graph
    digest = hashlib.sha256(f'"{graph}"'.encode()).hexdigest()[:8]
    return f"{graph[: LIMIT - 9].rstrip('-_.')}-{digest}"


def workers_of(graph: str) -> str:
    """Label selector of a graph's engines, of every role."""
    return f"{GRAPH}={graph_value(graph)},{CLASS}=worker"
