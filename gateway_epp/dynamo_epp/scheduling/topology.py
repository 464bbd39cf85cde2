"""How near two pods are to each other: for prefill workers beside the decode worker they serve.

Places are read from the pods' own labels, where whoever runs the cluster has to copy them from the
nodes. Source of levels and label names: llm-d's topology-extractor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from dynamo_crds.schema import Text

from dynamo_epp.scheduling.parameters import Parameters

Level = Literal["host", "rack", "zone", "region"]
LEVELS: tuple[Level, ...] = ("host", "rack", "zone", "region")
"""The nearest first; who shares a level shares the farther ones, too."""


class TopologyLabels(Parameters):
    """The labels that name a pod's place."""

    hostname: Text = "kubernetes.io/hostname"
    rack: Text = "topology.kubernetes.io/rack"
    zone: Text = "topology.kubernetes.io/zone"
    region: Text = "topology.kubernetes.io/region"


class Topology:
    """Compares places by the labels that ``TopologyLabels`` names."""

    def __init__(self, labels: TopologyLabels | None = None) -> None:
        names = labels or TopologyLabels()
        self._labels: tuple[tuple[Level, str], ...] = (
            ("host", names.hostname),
            ("rack", names.rack),
            ("zone", names.zone),
            ("region", names.region),
        )

    def shared(self, one: Mapping[str, str], other: Mapping[str, str]) -> Level | None:
        """The nearest level that both pods share; a label that one lacks is shared with nobody."""
        for level, label in self._labels:
            place = one.get(label)
            if place and place == other.get(label):
                return level
        return None
