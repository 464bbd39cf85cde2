"""How far a restart is, read from what runs."""

from __future__ import annotations

from dynamo_crds.parts import Restart
from dynamo_operator.reconcile import restart
from dynamo_operator.reconcile.observed import Json
from dynamo_operator.render import names

from tests.operator import objects


def stamped(item: Json, id: str) -> Json:
    """A pod, or the templates of a LeaderWorkerSet, with a restart's id."""
    group = item.get("spec", {}).get("leaderWorkerTemplate")
    if group is not None:
        group["workerTemplate"] = {"metadata": {}}
    parts = [item] if group is None else [group["leaderTemplate"], group["workerTemplate"]]
    for part in parts:
        part["metadata"].setdefault("annotations", {})[names.RESTART_ANNOTATION] = id
    return item


def test_engines_of_several_pods_have_restarted_when_their_pods_have() -> None:
    groups = {"worker": stamped(objects.leader_worker_set(wanted=2), "r2")}
    old, new = (
        [stamped(pod, id) for number in range(2) for pod in objects.pods_of_group(number)]
        for id in ("r1", "r2")
    )

    updating = objects.leader_worker_set(wanted=2, updating=True)["status"]

    def in_progress(pods: list[Json]) -> tuple[str, ...]:
        found = restart.plan(Restart(id="r2"), ["worker"], groups, pods)
        assert found is not None
        return found.in_progress

    assert in_progress(old) == in_progress([*new[:2], *old[2:]]) == ("worker",)
    assert in_progress(new) == ()
    groups["worker"]["status"] = updating
    assert in_progress(new) == ("worker",), "the counts may still be of the old ones"
