"""Prefers workers near the one that does the other half of the request: the cache travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters
from dynamo_epp.scheduling.topology import Level, Topology

NEARNESS: Mapping[Level | None, float] = {
    "host": 1.0,
    "rack": 0.2,
    "zone": 0.05,
    "region": 0.02,
    None: 0.0,
}


class TopologyScorerParameters(Parameters):
    topology_producer_name: str = ""
    """Accepted; there is one set of labels."""


class TopologyAffinityScorer:
    """1.0 on the same host, 0.2 in the same rack, 0.05 zone, 0.02 region; all 0 without a peer.
    Source: llm-d, by the bandwidth there is between two pods."""

    def __init__(self, _: TopologyScorerParameters, topology: Topology) -> None:
        self._topology = topology

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        if ask.peer is None:
            return [0.0] * len(candidates)
        here = ask.peer.endpoint.labels
        return [NEARNESS[self._topology.shared(here, ask.labels(each))] for each in candidates]
