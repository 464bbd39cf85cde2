"""Changes of a graph under constant load: no request fails, and there is always somebody to serve.

The load goes on for 20 s after each change, or as long as the rollout takes; the `long` cases
repeat the changes for minutes, with an operator that is killed again and again.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from e2e.load.constant import ConstantLoad, Result
from e2e.operator import graphs
from e2e.operator.space import HASH_LABEL, Json, Space, condition, is_ready, uids

RATE = float(os.environ.get("E2E_RATE", "100"))
SECONDS = 20.0
"""So long the load goes on at least."""
ROLLOUT_S = 180.0
ROLLBACK = {"nvidia.com/auto-rollback": "true"}


def check(result: Result) -> None:
    """What every change must leave clients with."""
    assert not result.failures, str(result)
    assert result.answered == result.sent > RATE * SECONDS * 0.8, str(result)
    assert not result.unroutable, str(result)
    assert result.fewest_routable >= 1, str(result)
    assert result.samples > SECONDS, str(result)


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


NAME = "agg"


@pytest.fixture(scope="module")
def at(module_space: Space) -> Space:
    module_space.apply(agg())
    module_space.wait_ready(NAME)
    return module_space


def agg(*flags: str, front: str = "1", **env: str) -> Json:
    return graphs.graph(
        NAME,
        graphs.frontend(GENERATION=front),
        graphs.worker(3, *flags, **env),
        annotations=ROLLBACK,
    )


@pytest.mark.timeout(400)
def test_workers_change(at: Space) -> None:
    old = uids(at.pods(NAME, "Worker"))

    def change() -> None:
        at.apply(agg(GENERATION="workers"))
        at.until(replaced(at, NAME, "Worker", old), "rolled out", ROLLOUT_S)

    check(under_load(at, NAME, change))
    assert len(old) == len(at.pods(NAME, "Worker")) == 3


@pytest.mark.timeout(400)
def test_frontend_changes(at: Space) -> None:
    old = uids(at.pods(NAME, "Frontend"))
    workers = uids(at.pods(NAME, "Worker"))

    def change() -> None:
        at.apply(agg(front="2", GENERATION="workers"))
        at.until(replaced(at, NAME, "Frontend", old), "rolled out", ROLLOUT_S)

    check(under_load(at, NAME, change))
    assert uids(at.pods(NAME, "Worker")) == workers


@pytest.mark.timeout(400)
def test_there_and_back_again(at: Space) -> None:
    """A → B → A in the middle: what serves is kept."""
    old = at.pods(NAME, "Worker")

    def change() -> None:
        at.apply(agg(front="2", GENERATION="between"))
        at.until(lambda: len(hashes(at.pods(NAME, "Worker"))) == 2, "two generations")
        at.apply(agg(front="2", GENERATION="workers"))
        at.until(
            lambda: (
                hashes(at.pods(NAME, "Worker", ending=True)) == hashes(old)
                and condition(at.get("dgd", NAME), "Ready").get("status") == "True"
            ),
            "back",
            ROLLOUT_S,
        )

    check(under_load(at, NAME, change))
    assert uids(at.pods(NAME, "Worker")) & uids(old), "none was kept"


@pytest.mark.timeout(400)
def test_crashing_workers_are_rolled_back(at: Space) -> None:
    old = at.pods(NAME, "Worker")

    def change() -> None:
        at.apply(agg("--block-size=none", front="2", GENERATION="workers"))
        at.until(
            lambda: at.condition(NAME, "RolledBack").get("status") == "True",
            "rolled back",
            ROLLOUT_S,
            lambda: at.story(NAME),
        )
        at.until(
            lambda: (
                hashes(at.pods(NAME, "Worker", ending=True)) == hashes(old)
                and all(map(is_ready, at.pods(NAME, "Worker")))
                and len(at.pods(NAME, "Worker")) == 3
            ),
            "the last good workers are back",
            ROLLOUT_S,
        )

    check(under_load(at, NAME, change))
    columns = at.columns(NAME)
    assert (columns["READY"], columns["STATE"]) == ("False", "failed")
    assert "change the graph to try again" in columns["WHY"]
    at.apply(agg(front="2", GENERATION="workers"))
    at.wait_ready(NAME)
    assert at.condition(NAME, "RolledBack")["status"] == "False"
