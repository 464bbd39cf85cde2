"""Graphs with prefill and decode workers roll out by generations, under load, whoever is killed.

The picker does not pair the two roles: decode workers answer by themselves. What is shown is that
the generations change as a whole, and that a worker that serves is never taken away too early.
"""

from __future__ import annotations

import pytest

from e2e.operator import graphs
from e2e.operator.platform import Platform
from e2e.operator.rolling import ROLLOUT_S, check, hashes, under_load
from e2e.operator.space import Json, Space, condition

NAME = "pd"
ROLES = ("Prefill", "Decode")


def at_rest(space: Space, generation: str) -> bool:
    """Whether the graph is ready and has pods of this generation only, one of them told by the
    variable that `graphs` sets."""
    pods = [pod for role in ROLES for pod in space.pods(NAME, role, ending=True)]
    found = {
        variable["value"]
        for pod in pods
        for variable in pod["spec"]["containers"][0]["env"]
        if variable["name"] == "GENERATION"
    }
    ready = condition(space.get("dgd", NAME), "Ready").get("status") == "True"
    return ready and found == {generation} and len(hashes(pods)) == 1


def generation(name: str) -> Json:
    """Generation "a", or "b" whose pods take their time, so that things can happen halfway."""
    return graphs.prefill_and_decode(NAME, hesitate=name == "b", GENERATION=name)


@pytest.mark.timeout(400)
def test_both_roles_change_together(platform: Platform, installed_space: Space) -> None:
    """Halfway the operator is killed; the standby goes on once the lease has run out."""
    space = installed_space
    space.apply(generation("a"))
    space.wait_ready(NAME)
    assert at_rest(space, "a")

    def change() -> None:
        space.apply(generation("b"))
        space.until(lambda: len(hashes(space.pods(NAME, "Decode"))) == 2, "two generations")
        platform.kill_leader()
        space.until(lambda: at_rest(space, "b"), "b", ROLLOUT_S, lambda: space.story(NAME))

    check(under_load(space, NAME, change))
    deployments = [d["metadata"]["name"] for d in space.list("deployments")]
    assert len(deployments) == 3, "something of the old generation is left"


@pytest.mark.timeout(400)
def test_there_and_back_again(space: Space) -> None:
    """A → B → A in the middle: what serves is kept."""
    space.apply(generation("a"))
    space.wait_ready(NAME)
    old = {pod["metadata"]["uid"] for pod in space.pods(NAME, "Decode")}

    def change() -> None:
        space.apply(generation("b"))
        space.until(lambda: len(hashes(space.pods(NAME, "Decode"))) == 2, "two generations")
        space.apply(generation("a"))
        space.until(lambda: at_rest(space, "a"), "a", ROLLOUT_S, lambda: space.story(NAME))

    check(under_load(space, NAME, change))
    assert old & {pod["metadata"]["uid"] for pod in space.pods(NAME, "Decode")}, "none was kept"
