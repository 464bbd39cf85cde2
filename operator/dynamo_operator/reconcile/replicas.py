"""Whose number of replicas counts: the graph's, its scaling adapter's, or an autoscaler's.

While an adapter exists, its number is the truth. When it goes, what runs stays until the graph's
own number changes. That takes a memory that outlives the operator: an annotation on the workload,
the marker, which says which number of the graph was last seen and what ran then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_operator.reconcile.ownership import writers
from dynamo_operator.render import names

AUTOSCALER = "kube-controller-manager"
"""Field manager of every HorizontalPodAutoscaler (KEDA's too), which writes through `scale`."""

_MARKER = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Marker:
    """The memory of an adapter: `graph`'s number that it overruled, and the number `kept`."""

    graph: int
    kept: int

    def __str__(self) -> str:
        return f"{self.graph}/{self.kept}"

    @classmethod
    def of(cls, workload: Mapping[str, Any] | None) -> Marker | None:
        """The marker on a workload; None if there is none, or none that makes sense."""
        if workload is None:
            return None
        text = (workload["metadata"].get("annotations") or {}).get(
            names.KEPT_REPLICAS_ANNOTATION, ""
        )
        match = _MARKER.fullmatch(text)
        return cls(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas a component is to have, and who says so."""

    replicas: int
    by: str
    """"graph", "adapter", "kept", or the field manager of an autoscaler on the workload."""
    marker: Marker | None = None
    """What to remember on the workload."""

    @property
    def yielded(self) -> bool:
        """Another writer owns the workload's number; it is not ours to apply."""
        return self.by not in ("graph", "adapter", "kept")


def decide(
    graph: int,
    adapter: int | None,
    workload: Mapping[str, Any] | None,
    earlier: Mapping[str, Any] | None = None,
) -> Decision:
    """The number for a component.

    `graph` is the number in the graph, `adapter` that of its adapter (None: there is none, or it is
    being deleted), `workload` the live workload, `earlier` that of the generation before while
    there is no other.
    """
    if adapter is not None:
        return Decision(adapter, "adapter", Marker(graph, adapter))
    marker = Marker.of(workload or earlier)
    moved = marker is not None and marker.graph != graph
    if workload is not None and not moved and (writer := foreign_writer(workload)):
        # Should the graph's number change, it counts again; till then nothing is written.
        return Decision(_number(workload), writer, Marker(graph, graph))
    if workload is None and earlier is not None and not moved and foreign_writer(earlier):
        # What it scaled is given up for a new generation, which begins with as many.
        return Decision(_number(earlier), "kept", Marker(graph, _number(earlier)))
    if marker is not None and not moved:
        return Decision(marker.kept, "kept", marker)
    return Decision(graph, "graph")


def _number(workload: Mapping[str, Any]) -> int:
    return int(workload["spec"].get("replicas", 1))


def foreign_writer(workload: Mapping[str, Any]) -> str:
    """The autoscaler that set the workload's number last; "" if it is ours or a person's.

    What a person scales by hand is drift, and is put right; an autoscaler would fight back.
    """
    for manager, subresource in writers(workload, ("spec", "replicas")):
        if subresource == "scale" and manager == AUTOSCALER:
            return manager
    return ""
