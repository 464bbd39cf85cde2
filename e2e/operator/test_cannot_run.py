"""Graphs that are accepted and can't run: one line of `kubectl get dgd` says why."""

from __future__ import annotations

import re
from typing import Any

import pytest

from e2e.operator import graphs
from e2e.operator.space import Json, Space

CRASH = "import sys; sys.exit('no license for model tiny')"


def without_secret() -> Json:
    worker = graphs.worker()
    main = worker["podTemplate"]["spec"]["containers"][0]
    main["envFrom"] = [{"secretRef": {"name": "hf-token-secret"}}]
    return worker


def running(image: str, **fields: Any) -> Json:
    return graphs.component("Worker", "worker", {"name": "main", "image": image, **fields})


CASES: dict[str, tuple[Json, str]] = {
    "no-image": (
        running("127.0.0.1:1/dynamo-platform/worker:none"),
        r"(ErrImagePull|ImagePullBackOff) on 1 of 1 Worker pod: .*127\.0\.0\.1:1/",
    ),
    "many-gpus": (
        running(
            "dynamo-platform/worker",
            resources={"limits": {"nvidia.com/gpu": "64"}},
        ),
        r"Unschedulable on 1 of 1 Worker pod: .*64 free nvidia\.com/gpu",
    ),
    "no-secret": (
        without_secret(),
        r'CreateContainerConfigError on 1 of 1 Worker pod: .*secret "hf-token-secret" not found',
    ),
    "crash": (
        running("dynamo-platform/worker", command=["python", "-c", CRASH]),
        r"CrashLoopBackOff on 1 of 1 Worker pod: .*no license for model tiny",
    ),
    "bad-flag": (
        graphs.worker(1, "--block-size=none"),
        r"CrashLoopBackOff on 1 of 1 Worker pod: .*--block-size",
    ),
    "foreign-runtime": (
        running(
            "dynamo-platform/worker",
            command=["python", "-c", "import signal; signal.pause()"],
        ),
        r"Starting on 1 of 1 Worker pod: .*; Worker: .* stay as written",
    ),
}


@pytest.mark.timeout(300)
def test_a_line_says_why(space: Space) -> None:
    """All at once: each has a frontend that runs and a worker that can't."""
    for name, (worker, _) in CASES.items():
        space.apply(graphs.graph(name, worker))
    for name, (_, why) in CASES.items():
        space.until(
            lambda name=name, why=why: re.search(why, space.columns(name)["WHY"]),
            f"{name} says {why}",
            90.0,
            lambda name=name: str(space.columns(name)),
        )
        columns = space.columns(name)
        print(columns["STATE"], columns["WHY"])
        assert columns["READY"] == "False"
        assert columns["STATE"] in ("failed", "pending")
