"""What breaks, breaks under load: how long requests go wrong then, and whether any is lost in vain.

The short form runs our workers behind a frontend and stock engines behind a foreign Gateway beside
each other; the long one all four pairs, and leaves a report.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from e2e.faults.deployment import Deployment
from e2e.faults.stories import (
    Found,
    Story,
    emptied_engine,
    hung_engine,
    hung_pod,
    killed_picker,
    lost_events,
    lost_metrics,
)
from e2e.faults.traffic import Conversations

REPORTS = Path(__file__).parents[2] / "docs" / "reports"
LIMITS_S = {
    "picker": 60.0,
    "5%": 8.0,
    "engine restarted": 8.0,
    "engine hung": 12.0,
    "pod": 12.0,
    "metrics": 0.5,
}
"""Within which routing has to be right again, by how the name of a fault begins. Of the first
almost all is the start of a process, which takes 3 s on an idle machine."""


async def told(it: Deployment, stories: Sequence[Story], count: int) -> list[Found]:
    async with it, Conversations(it.url, count, seed=7) as traffic:
        await traffic.until_right(time.monotonic())
        results = []
        for story in stories:
            results.append(await story(it, traffic))
            print(results[-1])  # shown only if one that follows fails
        return results


def check(results: Iterable[Found]) -> None:
    for one in results:
        print(one)
        assert one.unanswered == 0, f"{one.fault}: requests were lost that a retry would have saved"
        limit = next(limit for name, limit in LIMITS_S.items() if one.fault.startswith(name))
        assert one.correct_after <= limit or math.isinf(one.correct_after), one


@pytest.mark.timeout(300)
async def test_what_breaks_is_routed_around() -> None:
    lost = lost_events(4.0)
    ours = told(
        Deployment(stock=False, own_envoy=True),
        [killed_picker, lost, emptied_engine, hung_engine],
        count=6,
    )
    stock = told(
        Deployment(stock=True, own_envoy=False),
        [killed_picker, lost, emptied_engine, hung_engine, lost_metrics("503")],
        count=6,
    )
    for results in await asyncio.gather(ours, stock):
        check(results)


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_every_fault_in_every_place() -> None:
    faults = [killed_picker, lost_events(30.0), emptied_engine, hung_engine]
    metrics = [lost_metrics("503"), lost_metrics("hang")]
    found: dict[str, list[Found]] = {}
    for stock in (False, True):
        for own_envoy in (True, False):
            where = (
                f"{'stock engines' if stock else 'our workers'}, "
                f"{'dynamo frontend' if own_envoy else 'dynamo epp behind a Gateway'}"
            )
            stories = faults + (metrics if stock else [hung_pod])
            found[where] = await told(
                Deployment(stock=stock, own_envoy=own_envoy), stories, count=12
            )
    deaf = Deployment(stock=True, own_envoy=False, replay=False)
    found["stock engines without replay_endpoint"] = await told(deaf, [lost_events(30.0)], count=12)
    path = REPORTS / f"{time.strftime('%Y-%m-%d')}-faults.md"
    path.write_text(report(found))
    for results in found.values():
        check(results)


def report(found: dict[str, list[Found]]) -> str:
    lines = [
        f"# Faults under load, {time.strftime('%Y-%m-%d')}",
        "",
        "What each fault means, and what to do: [faults.md](../faults.md). *Right after*: seconds "
        "to the first request from which on all were routed right (answered in time, by an engine "
        "that has the conversation, exact, and with as much cached as the picker said). *Cut*: "
        "the answer had begun, if only with its head. *Sent again*: failed before that, and "
        "answered when the client asked again. *Unanswered*: failed in spite of that.",
        "",
    ]
    for where, results in found.items():
        lines += [
            f"## {where[0].upper()}{where[1:]}",
            "",
            "| fault | right after | requests | cut | sent again | unanswered | also |",
            "|---|---|---|---|---|---|---|",
        ]
        for one in results:
            also = "; ".join(_told(name, value) for name, value in one.told.items())
            lines.append(
                f"| {one.fault} | {_seconds(one.correct_after)} | {one.sent} | {one.cut} "
                f"| {one.sent_again} | {one.unanswered} | {also} |"
            )
        lines.append("")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f} s"


def _told(name: str, value: float | str) -> str:
    """`back_after_s` 1.5 -> back after 1.5 s."""
    words = name.removesuffix("_s").replace("_", " ")
    return f"{words} {value} s" if name.endswith("_s") else f"{words} {value}"
