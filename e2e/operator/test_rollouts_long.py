"""Minutes of changes under constant load, with an operator that is killed again and again.

Leaves a dated report. `ROLLOUT_SECONDS` (300) is the length of each case.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.load.constant import ConstantLoad, Result
from e2e.operator import graphs
from e2e.operator.operators import HostOperator
from e2e.operator.rolling import RATE, ROLLOUT_S, check
from e2e.operator.space import Json, Space, condition

pytestmark = pytest.mark.usefixtures("direct")

REPORTS = Path(__file__).parent.parent.parent / "docs" / "reports"
SECONDS = float(os.environ.get("ROLLOUT_SECONDS", "300"))
SEED = 7
NAME = "long"
ROLLBACK = {"nvidia.com/auto-rollback": "true"}

Make = Callable[[str, str], Json]
"""From the generations of frontend and workers to the graph; generation "broken" crashes."""


def flags(workers: str) -> tuple[str, ...]:
    return ("--block-size=none",) if workers == "broken" else ()


def aggregated(front: str, workers: str) -> Json:
    return graphs.graph(
        NAME,
        graphs.frontend(GENERATION=front),
        graphs.worker(3, *flags(workers), GENERATION=workers),
        annotations=ROLLBACK,
    )


def disaggregated(front: str, workers: str) -> Json:
    roles = (("Prefill", "prefill", 1), ("Decode", "decode", 2))
    return graphs.graph(
        NAME,
        graphs.frontend(GENERATION=front),
        *(
            graphs.worker(count, *flags(workers), name=name, type=type, GENERATION=workers)
            for name, type, count in roles
        ),
        annotations=ROLLBACK,
    )


def settled(space: Space) -> bool:
    """Whether the graph is as it is wanted, or has gone back to what worked."""
    graph = space.get("dgd", NAME)
    return "True" in (
        condition(graph, "Ready").get("status"),
        condition(graph, "RolledBack").get("status"),
    )


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 900)
@pytest.mark.parametrize("make", [aggregated, disaggregated], ids=lambda make: make.__name__)
def test_minutes_of_changes(bare_space: Space, make: Make) -> None:
    """Workers, frontends, A → B → A, what crashes, in random order; each change is let settle or is
    overtaken by the next, and with each the operator may be killed."""
    space, rng = bare_space, random.Random(SEED)
    done: list[str] = []
    operator = HostOperator(space).__enter__()
    try:
        space.apply(make("0", "0"))
        space.wait_ready(NAME)
        front = workers = "0"
        with ConstantLoad(space.url(NAME), rate=RATE) as load:
            end = time.monotonic() + SECONDS
            for number in itertools.count(1):
                before = front, workers
                what = rng.choice(["frontend", "workers", "workers", "there and back", "broken"])
                if what == "frontend":
                    front = str(number)
                elif what == "broken":
                    workers = "broken"
                else:
                    workers = str(number)
                space.apply(make(front, workers))
                if rng.random() < 0.5:
                    what += ", operator killed"
                    time.sleep(rng.uniform(0.0, 5.0))
                    operator.kill()
                    operator.__exit__(None, None, None)
                    operator = HostOperator(space).__enter__()
                if what.startswith("there and back"):
                    time.sleep(rng.uniform(1.0, 10.0))
                    front, workers = before
                    space.apply(make(front, workers))
                if what.startswith("broken") or rng.random() < 0.7:
                    space.until(lambda: settled(space), what, ROLLOUT_S, lambda: space.story(NAME))
                else:
                    what += ", overtaken by the next"
                if workers == "broken":
                    workers = before[1]
                    space.apply(make(front, workers))
                done.append(what)
                if time.monotonic() > end:
                    break
            space.until(lambda: settled(space), "the end", ROLLOUT_S, lambda: space.story(NAME))
    finally:
        operator.__exit__(None, None, None)
    report(make.__name__, load.result, done)
    check(load.result, least=0.95)


def report(case: str, result: Result, done: list[str]) -> None:
    """What was done and seen, beside what earlier cases of the day left."""
    path = REPORTS / f"{time.strftime('%Y-%m-%d')}-rollouts.md"
    text = "# Rollouts under load\n" if not path.exists() else path.read_text()
    text += f"\n## {case}\n\n```text\n{result}\n```\n\n"
    text += "\n".join(f"{number}. {what}" for number, what in enumerate(done, 1)) + "\n"
    path.write_text(text)
