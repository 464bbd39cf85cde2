"""Changes of a graph under constant load: no request fails, and there is always somebody to serve.

The load goes on for 20 s after each change, or as long as the rollout takes.
"""

from __future__ import annotations

import copy
import secrets

import pytest

from e2e.operator import graphs
from e2e.operator.rolling import ROLLOUT_S, check, hashes, replaced, under_load
from e2e.operator.space import Json, Space, condition, is_ready, uids

pytestmark = pytest.mark.usefixtures("direct")

NAME = "agg"


@pytest.fixture(scope="module")
def at(module_space: Space) -> Space:
    """A graph of a frontend and three workers; each test changes it and leaves it ready."""
    module_space.apply(
        graphs.graph(
            NAME,
            graphs.frontend(),
            graphs.worker(3),
            annotations={"nvidia.com/auto-rollback": "true"},
        )
    )
    module_space.wait_ready(NAME)
    return module_space


Components = dict[str, Json]
"""By name, as they stand in the graph."""


def components(space: Space) -> Components:
    return {each["name"]: each for each in space.get("dgd", NAME)["spec"]["components"]}


def write(space: Space, wanted: Components) -> None:
    space.patch("dgd", NAME, {"spec": {"components": list(wanted.values())}})


def anew(component: Json) -> Json:
    """`component` with another template."""
    changed = copy.deepcopy(component)
    main = changed["podTemplate"]["spec"]["containers"][0]
    main["env"].append({"name": f"CHANGE_{secrets.token_hex(2)}", "value": "1"})
    return changed


@pytest.mark.timeout(400)
def test_workers_change(at: Space) -> None:
    old, now = uids(at.pods(NAME, "Worker")), components(at)

    def change() -> None:
        write(at, {**now, "Worker": anew(now["Worker"])})
        at.until(replaced(at, NAME, "Worker", old), "rolled out", ROLLOUT_S)

    check(under_load(at, NAME, change))
    assert len(old) == len(at.pods(NAME, "Worker")) == 3


@pytest.mark.timeout(400)
def test_frontend_changes(at: Space) -> None:
    old, now = uids(at.pods(NAME, "Frontend")), components(at)
    workers = uids(at.pods(NAME, "Worker"))

    def change() -> None:
        write(at, {**now, "Frontend": anew(now["Frontend"])})
        at.until(replaced(at, NAME, "Frontend", old), "rolled out", ROLLOUT_S)

    check(under_load(at, NAME, change))
    assert uids(at.pods(NAME, "Worker")) == workers


@pytest.mark.timeout(400)
def test_there_and_back_again(at: Space) -> None:
    """A → B → A in the middle: what serves is kept."""
    old, now = at.pods(NAME, "Worker"), components(at)

    def back() -> bool:
        ready = condition(at.get("dgd", NAME), "Ready").get("status") == "True"
        return ready and hashes(at.pods(NAME, "Worker", ending=True)) == hashes(old)

    def change() -> None:
        write(at, {**now, "Worker": graphs.hesitant(anew(now["Worker"]))})
        at.until(lambda: len(hashes(at.pods(NAME, "Worker"))) == 2, "two generations")
        write(at, now)
        at.until(back, "back", ROLLOUT_S, lambda: at.story(NAME))

    check(under_load(at, NAME, change))
    assert uids(at.pods(NAME, "Worker")) & uids(old), "none was kept"


@pytest.mark.timeout(400)
def test_crashing_workers_are_rolled_back(at: Space) -> None:
    old, now = at.pods(NAME, "Worker"), components(at)

    def restored() -> bool:
        pods = at.pods(NAME, "Worker", ending=True)
        return hashes(pods) == hashes(old) and len(pods) == 3 and all(map(is_ready, pods))

    def change() -> None:
        broken = anew(now["Worker"])
        broken["podTemplate"]["spec"]["containers"][0]["args"].append("--block-size=none")
        write(at, {**now, "Worker": broken})
        at.until(
            lambda: at.condition(NAME, "RolledBack").get("status") == "True",
            "rolled back",
            ROLLOUT_S,
            lambda: at.story(NAME),
        )
        at.until(restored, "the last good workers are back", ROLLOUT_S)

    check(under_load(at, NAME, change))
    columns = at.columns(NAME)
    assert (columns["READY"], columns["STATE"]) == ("False", "failed")
    assert "change the graph to try again" in columns["WHY"]
    write(at, now)
    at.wait_ready(NAME)
    assert at.condition(NAME, "RolledBack")["status"] == "False"
