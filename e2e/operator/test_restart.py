"""A restart that a graph asks for: component by component, in order, or all at once."""

from __future__ import annotations

import pytest

from e2e.operator import graphs
from e2e.operator.space import Json, Space, is_ready, uids

NAME = "again"


def graph(id: str = "", strategy: str = "Sequential") -> Json:
    restart: Json = {}
    if id:
        restart = {"restart": {"id": id, "strategy": {"type": strategy}}}
        if strategy == "Sequential":
            restart["restart"]["strategy"]["order"] = ["Worker", "Frontend"]
    return graphs.graph(NAME, graphs.frontend(), graphs.worker(2), **restart)


def restarted(space: Space, id: str) -> bool:
    status = space.get("dgd", NAME)["status"]
    if (status.get("restart") or {}).get("observedID") != id:
        return False
    return bool(status["restart"]["phase"] == "Completed")


@pytest.mark.timeout(400)
def test_one_component_after_the_other(space: Space) -> None:
    space.apply(graph())
    space.wait_ready(NAME)
    old = {role: uids(space.pods(NAME, role)) for role in ("Worker", "Frontend")}

    space.apply(graph("first"))
    seen: list[list[str]] = []

    def watching() -> bool:
        restart = space.get("dgd", NAME)["status"].get("restart") or {}
        seen.append(restart.get("inProgress") or [])
        if uids(space.pods(NAME, "Frontend")) - old["Frontend"]:
            workers = space.pods(NAME, "Worker")
            assert not uids(workers) & old["Worker"], "the frontend came too early"
            assert all(map(is_ready, workers))
        return restarted(space, "first")

    space.until(watching, "restarted", 180.0, lambda: space.story(NAME))
    space.wait_ready(NAME)
    order = [names for number, names in enumerate(seen) if names and names != seen[number - 1]]
    assert order == [["Worker"], ["Frontend"]]
    for role, before in old.items():
        assert not uids(space.pods(NAME, role)) & before
    events = [event["reason"] for event in space.list("events")]
    assert events.count("RestartStarted") == events.count("RestartCompleted") == 1

    # The same id again is no new restart.
    now = uids(space.pods(NAME))
    space.annotate("dgd", NAME, "example.com/touched=1")
    space.apply(graph("second", "Parallel"))
    space.until(lambda: restarted(space, "second"), "restarted", 180.0, lambda: space.story(NAME))
    space.wait_ready(NAME)
    space.until(lambda: not uids(space.pods(NAME, ending=True)) & now, "all replaced")
