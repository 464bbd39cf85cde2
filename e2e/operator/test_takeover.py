"""A newer operator, whose rendering differs, takes over: it restarts no pod until it is asked."""

from __future__ import annotations

import pytest

from e2e.operator import graphs
from e2e.operator.operators import HostOperator
from e2e.operator.rolling import ROLLOUT_S, check, under_load
from e2e.operator.space import Json, Space, condition, uids

pytestmark = pytest.mark.usefixtures("direct")

NAME = "kept"
OLD, NEW = ("--drain-seconds", "45"), ("--drain-seconds", "75")
"""What the operators put into every pod whose author says nothing about it."""


def graph(workers: int) -> Json:
    """Its pods leave the drain limit to the platform."""
    components = [graphs.frontend(), graphs.worker(workers)]
    for component in components:
        main = component["podTemplate"]["spec"]["containers"][0]
        main["env"] = [entry for entry in main["env"] if entry["name"] != "DYN_DRAIN_SECONDS"]
    return graphs.graph(NAME, *components)


def drain_limits(space: Space) -> set[str]:
    """Those that the pods were given."""
    return {
        entry["value"]
        for pod in space.pods(NAME)
        for entry in pod["spec"]["containers"][0]["env"]
        if entry["name"] == "DYN_DRAIN_SECONDS"
    }


@pytest.mark.timeout(400)
def test_no_pod_is_restarted_until_asked(bare_space: Space) -> None:
    space = bare_space
    with HostOperator(space, *OLD):
        space.apply(graph(2))
        space.wait_ready(NAME)
        before = uids(space.pods(NAME))
        assert drain_limits(space) == {"45"}

    def take_over() -> None:
        with HostOperator(space, *NEW) as newer:
            space.until(
                lambda: newer.metric("controller_runtime_reconcile_total") > 0, "reconciled"
            )
            assert newer.metric("dynamo_operator_writes_total") == 0
            # What is no matter of templates goes on, and new pods are like those that run.
            space.apply(graph(3))
            space.until(lambda: len(space.pods(NAME, "Worker")) == 3, "a third worker")
            space.wait_ready(NAME)
            assert before < uids(space.pods(NAME, ending=True))
            assert drain_limits(space) == {"45"}

            space.annotate("dgd", NAME, "nvidia.com/adopt-rendering=1")

            def adopted() -> bool:
                ready = condition(space.get("dgd", NAME), "Ready").get("status") == "True"
                pods = space.pods(NAME, ending=True)
                return ready and not uids(pods) & before and drain_limits(space) == {"75"}

            space.until(adopted, "adopted", ROLLOUT_S, lambda: space.story(NAME))

    check(under_load(space, NAME, take_over))
