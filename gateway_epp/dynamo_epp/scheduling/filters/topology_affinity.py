"""Keeps the workers that are near enough to the one that does the other half of the request."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters
from dynamo_epp.scheduling.topology import LEVELS, Level, Topology


class TopologyFilterParameters(Parameters):
    min_affinity: Level = "host"
    """The farthest level that still counts as near."""
    topology_producer_name: str = ""
    """Accepted; there is one set of labels."""


class TopologyAffinityFilter:
    """A preference: without a peer, or with nobody near it, everybody passes."""

    def __init__(self, parameters: TopologyFilterParameters, topology: Topology) -> None:
        self._level = parameters.min_affinity
        self._near = LEVELS[: LEVELS.index(parameters.min_affinity) + 1]
        self._topology = topology

    def reasons(self, ask: Ask, candidates: Sequence[Candidate]) -> list[str]:
        if ask.peer is None:
            return [""] * len(candidates)
        here = ask.peer.endpoint.labels
        near = [self._topology.shared(here, ask.labels(c)) in self._near for c in candidates]
        if not any(near):
            return [""] * len(candidates)
        far = f"shares no {self._level} with {ask.peer.name}"
        return ["" if close else far for close in near]
