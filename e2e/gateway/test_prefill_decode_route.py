"""The same graph behind Istio, by the HTTPRoute that the operator makes of one annotation."""

from __future__ import annotations

import pytest

from e2e.cluster import Cluster
from e2e.cluster.fixtures import Gateway
from e2e.gateway import pools
from e2e.gateway.prefill_decode import NAME, PICKER, Graph, long_ones_are_split, wanted
from e2e.gateway.space import START_S, Space
from e2e.operator.operators import HostOperator
from e2e.operator.space import Space as Objects


@pytest.mark.long
@pytest.mark.timeout(START_S + 300)
async def test_long_prompts_are_split_and_cached_ones_are_not(
    with_crds: Cluster, gateway: Gateway, namespace: str
) -> None:
    objects, space = Objects(with_crds, namespace), Space(with_crds, namespace)
    annotations = {"nvidia.com/gateway": f"{gateway.namespace}/{gateway.name}"}
    with_crds.apply(pools.tls_rule(PICKER, namespace))
    with HostOperator(objects):
        objects.apply(wanted(annotations=annotations))
        objects.wait_ready(NAME)
        graph = Graph(space, objects, f"http://{gateway.address}")
        await graph.is_reached()
        await long_ones_are_split(graph)
