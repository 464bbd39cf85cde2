"""Graphs with prefill and decode workers roll out by generations, under load, whoever is killed.

The generations change as a whole, a worker that serves is never taken away too early, and no prompt
is computed by a worker of another generation than the one that answers.
"""

from __future__ import annotations

import json
import urllib.request

import pytest

from e2e.operator import graphs
from e2e.operator.platform import Platform
from e2e.operator.rolling import ROLLOUT_S, check, hashes, under_load
from e2e.operator.space import Json, Space, condition

pytestmark = pytest.mark.usefixtures("direct")

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


def pairs(space: Space) -> set[tuple[str, ...]]:
    """Worker hashes of who computed the prompt and who answered, as the workers themselves told the
    frontend of its last two thousand requests."""
    (frontend,) = space.pods(NAME, "Frontend")
    url = f"http://{frontend['status']['podIP']}:9090/debug/decisions?brief=1&limit=2000"
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        outcomes = [(each["outcome"], each["worker"]) for each in json.load(answer)["decisions"]]
    # Names of pods: GRAPH-ROLE-HASH-…
    return {
        tuple(name.split("-")[2] for name in (outcome["prefilled_by"], worker))
        for outcome, worker in outcomes
        if "prefilled_by" in outcome
    }


@pytest.mark.timeout(400)
def test_both_roles_change_together(platform: Platform, installed_space: Space) -> None:
    """Halfway the operator is killed; the standby goes on once the lease has run out."""
    space = installed_space
    space.apply(generation("a"))
    space.wait_ready(NAME)
    assert at_rest(space, "a")
    paired: set[tuple[str, ...]] = set()

    def change() -> None:
        space.apply(generation("b"))
        space.until(lambda: len(hashes(space.pods(NAME, "Decode"))) == 2, "two generations")
        platform.kill_leader()
        space.until(lambda: at_rest(space, "b"), "b", ROLLOUT_S, lambda: space.story(NAME))
        paired.update(pairs(space))

    check(under_load(space, NAME, change))
    assert len(paired) == 2, "both generations computed prompts"
    assert [pair for pair in paired if len(set(pair)) != 1] == []
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
