"""Changing a graph while requests come in at a constant rate, and what clients must have seen."""

from __future__ import annotations

import os
from collections.abc import Callable

from e2e.load.constant import ConstantLoad, Result
from e2e.operator.space import HASH_LABEL, Json, Space, condition, uids

RATE = float(os.environ.get("E2E_RATE", "100"))
SECONDS = 20.0
"""So long the load goes on at least."""
ROLLOUT_S = 180.0


def check(result: Result, least: float = 0.9) -> None:
    """What every change must leave clients with. Requests must have left at `least` that share of
    `RATE` over the whole run: a load that comes slower proves less than it says."""
    assert not result.failures, str(result)
    assert result.answered == result.sent, str(result)
    assert result.rate >= least * RATE, str(result)
    assert not result.unroutable, str(result)
    assert result.fewest_routable >= 1, str(result)
    assert result.samples > result.seconds, str(result)


def under_load(space: Space, name: str, change: Callable[[], None]) -> Result:
    """`change`, which returns when it has taken effect, while requests come in."""
    with ConstantLoad(space.url(name), rate=RATE) as load:
        load.wait_until(2.0)
        change()
        load.wait_until(SECONDS)
    return load.result


def hashes(pods: list[Json]) -> set[str]:
    return {pod["metadata"]["labels"][HASH_LABEL] for pod in pods}


def replaced(space: Space, name: str, component: str, old: set[str]) -> Callable[[], bool]:
    """Whether none of the pods `old` is left and the graph is ready."""

    def now() -> bool:
        pods = space.pods(name, component, ending=True)
        ready = condition(space.get("dgd", name), "Ready").get("status") == "True"
        return ready and not uids(pods) & old

    return now
