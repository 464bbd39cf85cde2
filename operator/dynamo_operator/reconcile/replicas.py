"""Whose number of replicas counts: the graph's, its scaling adapter's, or an autoscaler's.

While an adapter exists, its number is the truth. When it goes, what runs stays until the graph's
own number changes. An autoscaler on the workload itself is yielded to, just as long. That takes a
memory that outlives the operator: an annotation on the workload, the marker, which says which
number of the graph was last seen, and what overruled it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_operator.reconcile.ownership import ROLLOUT_MANAGER, writers
from dynamo_operator.render import names

AUTOSCALER = "kube-controller-manager"
"""Field manager of every HorizontalPodAutoscaler (KEDA's too), which writes through `scale`."""

_MARKER = re.compile(r"(\d+)(?:/(\d+))?(/autoscaler)?")


@dataclass(frozen=True, slots=True)
class Marker:
    """The memory of who overruled the graph's number: `2/8` of an adapter, `2/autoscaler` of an
    autoscaler on this workload, `2/8/autoscaler` of one on an earlier generation's."""

    graph: int
    """The number that was overruled."""
    kept: int | None
    """The number that counts instead; None while the workload itself says it."""
    autoscaled: bool = False

    def __str__(self) -> str:
        number = "" if self.kept is None else f"/{self.kept}"
        return f"{self.graph}{number}{'/autoscaler' if self.autoscaled else ''}"

    @classmethod
    def of(cls, workload: Mapping[str, Any] | None) -> Marker | None:
        """The marker on a workload; None if there is none, or none that makes sense."""
        if workload is None:
            return None
        text = (workload["metadata"].get("annotations") or {}).get(
            names.KEPT_REPLICAS_ANNOTATION, ""
        )
        match = _MARKER.fullmatch(text)
        if match is None or not (match[2] or match[3]):
            return None
        return cls(int(match[1]), int(match[2]) if match[2] else None, bool(match[3]))


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas a component is to have, and who says so."""

    replicas: int
    by: str
    """"graph", "adapter", "kept" (of an adapter that was removed), "outlived" (of an autoscaler on
    an earlier generation), or the field manager of an autoscaler on the workload."""
    marker: Marker | None = None
    """What to remember on the workload."""
    renumbered: bool = False
    """Whether the graph's number, which an adapter overrules, is another than was remembered."""

    @property
    def yielded(self) -> bool:
        """Another writer owns the workload's number; it is not ours to apply."""
        return self.by not in ("graph", "adapter", "kept", "outlived")


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
    marker = Marker.of(workload or earlier)
    moved = marker is not None and marker.graph != graph
    if adapter is not None:
        return Decision(adapter, "adapter", Marker(graph, adapter), moved)
    if moved:
        return Decision(graph, "graph")
    if workload is not None and is_yielded(workload):
        return Decision(number(workload), AUTOSCALER, Marker(graph, None, autoscaled=True))
    if workload is None or (marker is not None and marker.kept is None):
        # It is yet to come, or was given up before: the generation that it follows knows a number.
        marker = _outlived(graph, earlier)
    if marker is None or marker.kept is None:
        return Decision(graph, "graph")
    return Decision(marker.kept, "outlived" if marker.autoscaled else "kept", marker)


def _outlived(graph: int, earlier: Mapping[str, Any] | None) -> Marker | None:
    """What a generation takes over from the `earlier` one; None for nothing."""
    marker = Marker.of(earlier)
    if marker is not None and marker.graph != graph:
        return None
    if earlier is not None and is_yielded(earlier):
        return Marker(graph, number(earlier), autoscaled=True)
    return marker


def number(workload: Mapping[str, Any]) -> int:
    """The replicas in a workload's spec."""
    return int(workload["spec"].get("replicas", 1))


def is_yielded(workload: Mapping[str, Any]) -> bool:
    """Whether a workload's number is left to an autoscaler on it: that set it, and since then
    nobody did but people. What they scale by hand, the autoscaler puts right if it still is there.

    Where no autoscaler ever was, what a person scales is drift, and is put right here.
    """
    found = writers(workload, ("spec", "replicas"))
    if (AUTOSCALER, "scale") in found:
        return True
    marker = Marker.of(workload)
    if marker is None or marker.kept is not None:
        return False
    return not any(manager == ROLLOUT_MANAGER for manager, _ in found)
