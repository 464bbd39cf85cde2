"""Changes of a graph under constant load: no request fails, and there is always somebody to serve.

The load goes on for 20 s after each change, or as long as the rollout takes.
"""

from __future__ import annotations

import pytest

from e2e.operator import graphs
from e2e.operator.rolling import ROLLOUT_S, check, hashes, replaced, under_load
from e2e.operator.space import Json, Space, condition, is_ready, uids

ROLLBACK = {"nvidia.com/auto-rollback": "true"}
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
