"""The faults one by one: what is done, how long routing was wrong, which requests were lost."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from e2e.faults.deployment import HUNG_S, START_S, Deployment, Node, eventually
from e2e.faults.traffic import Attempt, Conversations

LOSS = 0.05
WARM_S = 2.0
"""After a picker calls itself ready, or an engine answers again, all has to be as it was."""


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one fault. Times are seconds."""

    fault: str
    correct_after: float
    """From the fault to the first request from which on all went right."""
    sent: int
    """Requests while it lasted."""
    cut: int
    """Lost for good: the answer had begun."""
    sent_again: int
    """Failed before that, and were answered when they were sent again."""
    unanswered: int
    """Were sent again and again and never answered."""
    wrong: Counter[str]
    told: dict[str, float | str] = field(default_factory=dict)
    """What else is worth knowing of this one."""


def found(
    fault: str, traffic: Conversations, began: float, correct_after: float, **told: float | str
) -> Found:
    attempts = traffic.since(began)
    requests = {one.request for one in attempts}
    answered = {one.request for one in attempts if one.ended and not one.problem}
    cut = {one.request for one in attempts if one.lost}
    failed = {one.request for one in attempts if one.problem and not one.lost}
    return Found(
        fault,
        correct_after,
        len(requests),
        len(cut),
        len(failed & answered),
        len(failed - answered - cut),
        Counter(_kind(one) for one in attempts if one.wrong),
        told,
    )


def _kind(attempt: Attempt) -> str:
    """Without the figures."""
    wrong = attempt.wrong
    for kind in ("said", "late", "the engine had", "another engine"):
        if wrong.startswith(kind):
            return kind
    return wrong[:60]


Story = Callable[[Deployment, Conversations], Awaitable[Found]]


async def killed_picker(it: Deployment, traffic: Conversations) -> Found:
    """SIGKILL, and started again at once."""
    began = time.monotonic()
    await it.picker.kill()
    await it.restart_picker()
    ready = time.monotonic() - began
    seconds = await traffic.until_right(began, limit_s=START_S)
    after = [one for one in traffic.attempts if one.sent >= began and one.routing]
    first = min(after, key=lambda one: one.sent)
    assert not first.wrong, f"the first decision of the new picker was no good: {first}"
    assert seconds <= ready + WARM_S
    return found("picker killed", traffic, began, seconds, ready_after_s=round(ready, 2))


def lost_events(for_s: float) -> Story:
    async def story(it: Deployment, traffic: Conversations) -> Found:
        """Some of what engines say does not arrive, and then everything does again."""
        began = time.monotonic()
        before = sum(node.wire.passed for node in it.nodes)
        for node in it.nodes:
            node.wire.loss = LOSS
        await asyncio.sleep(for_s)

        async def all_lost_some() -> bool:
            return all(node.wire.lost for node in it.nodes)

        await eventually(all_lost_some, 30.0)
        for node in it.nodes:
            node.wire.loss = 0.0
        ended = time.monotonic()
        if it.replay:
            seconds = await traffic.until_right(ended)
        else:
            await traffic.until_answered(20)
            seconds = math.inf  # what was lost is lost: approximate until the engine begins anew
        wires = {node.engine(): node.wire for node in it.nodes}
        for one in traffic.since(began):
            if one.wrong.startswith("said") and one.routing.startswith("exact"):
                # Slack for a machine with much else to do.
                seen = wires[one.engine].is_blind(one.sent - 0.3, one.first + 0.1)
                assert seen, f"{one.wrong}, called exact though the loss could be known: {one}"
        lost = sum(node.wire.lost for node in it.nodes)
        passed = sum(node.wire.passed for node in it.nodes) - before
        blind = [known - at for node in it.nodes for at, known in node.wire.blind]
        exact = sum(one.routing.startswith("exact") for one in traffic.since(began))
        return found(
            f"{LOSS:.0%} of KV events lost",
            traffic,
            began,
            seconds,
            messages=f"{lost} of {lost + passed}",
            exact=f"{exact} of {len(traffic.since(began))}",
            longest_unnoticed_s=round(max(blind), 2),
        )

    return story


async def emptied_engine(it: Deployment, traffic: Conversations) -> Found:
    """The engine that has most is killed, and begins anew at the same address."""
    node = fullest(it, traffic)
    old = node.engine()
    began = time.monotonic()
    await node.kill()
    traffic.ledger.forget(old)
    await node.restarted()
    back = time.monotonic() - began
    used = await traffic.until_served_by(node.engine(), began)
    seconds = await traffic.until_right(began)
    last = {"approximate": 0.0, "misled": 0.0}
    for one in traffic.since(began):
        if one.wrong:
            kind = "approximate" if one.wrong == "approximate" else "misled"
            last[kind] = max(last[kind], one.sent - began)
    # As long as nobody knows what it caches, choosing among all of them is approximate.
    assert last["approximate"] <= back + WARM_S
    return found(
        "engine restarted empty",
        traffic,
        began,
        last["misled"],
        back_after_s=round(back, 2),
        exact_after_s=round(seconds, 2),
        used_again_s=round(used, 2),
    )


async def hung_engine(it: Deployment, traffic: Conversations) -> Found:
    """SIGSTOP. A launcher ends its engine after a while; a stock one goes on in the end."""
    node, engine, began, waiting = await _stopped(it, traffic, whole=False)
    given_up = time.monotonic() - began
    seconds = await traffic.until_right(began)
    if it.stock:
        _goes_on(node, engine, traffic, whole=False)
        how = "goes on"
    else:
        await node.ended(HUNG_S + 30)
        traffic.ledger.forget(engine)
        how = "ended by its launcher"
    ended = time.monotonic()
    if not it.stock:
        await node.restarted()
    return await _in_the_end(
        f"engine hung, {how}", it, traffic, node, began, seconds, given_up, ended, waiting
    )


async def hung_pod(it: Deployment, traffic: Conversations) -> Found:
    """SIGSTOP for all of it, a launcher included; then all of it goes on."""
    node, engine, began, waiting = await _stopped(it, traffic, whole=True)
    given_up = time.monotonic() - began
    seconds = await traffic.until_right(began)
    _goes_on(node, engine, traffic, whole=True)
    ended = time.monotonic()
    return await _in_the_end(
        "pod hung, goes on", it, traffic, node, began, seconds, given_up, ended, waiting
    )


async def _stopped(
    it: Deployment, traffic: Conversations, *, whole: bool
) -> tuple[Node, int, float, list[Attempt]]:
    """(who, its engine, when, the requests that wait there), once the picker has given it up."""
    await it.until(len(it.nodes), "dynamo_epp_circuits", 30.0, state="closed")
    node = fullest(it, traffic)
    engine = node.engine()
    began = time.monotonic()
    node.signal(signal.SIGSTOP, whole=whole)
    traffic.ledger.away.add(engine)
    await it.until(1, "dynamo_epp_circuits", 20.0, state="open")
    waiting = [one for one in traffic.since(began) if not one.ended and not one.first]
    return node, engine, began, waiting


def _goes_on(node: Node, engine: int, traffic: Conversations, *, whole: bool) -> None:
    node.signal(signal.SIGCONT, whole=whole)
    traffic.ledger.away.discard(engine)


async def _in_the_end(
    fault: str,
    it: Deployment,
    traffic: Conversations,
    node: Node,
    began: float,
    seconds: float,
    given_up: float,
    ended: float,
    waiting: list[Attempt],
) -> Found:
    """It is used again, and everybody who waited has an answer."""
    used = await traffic.until_served_by(node.engine(), time.monotonic())
    await traffic.until_right(time.monotonic())
    async with asyncio.timeout(30):
        while any(not one.ended for one in waiting):
            await traffic.changed(1.0)
    failed = [one.problem for one in waiting if one.problem]
    # Our middleware keeps a stream's head back until there is a token: it can go elsewhere.
    assert not failed, failed
    return found(
        fault,
        traffic,
        began,
        seconds,
        given_up_after_s=round(given_up, 2),
        waited=f"{len(waiting)}, all answered",
        lasted_s=round(ended - began, 2),
        used_again_s=round(used, 2),
    )


def lost_metrics(how: str) -> Story:
    async def story(it: Deployment, traffic: Conversations) -> Found:
        """The engine answers requests, and its metrics can't be had."""
        node = fullest(it, traffic)
        began = time.monotonic()
        node.fail_metrics(how)
        await it.until(1, "dynamo_epp_workers_without_figures", 20.0)
        told = time.monotonic() - began
        (shown,) = [one for one in await it.workers() if one["name"] == node.name]
        assert shown["load_problem"].startswith("its metrics can't be had: "), shown
        assert (shown["state"], shown["circuit"]) == ("exact", ""), shown
        seconds = await traffic.until_right(began, limit_s=told + 5.0)
        served = [one for one in traffic.since(began) if one.engine == node.engine() and one.first]
        assert served, "an engine without metrics got nothing"
        node.fail_metrics("")
        await it.until(0, "dynamo_epp_workers_without_figures", 10.0)
        return found(
            f"metrics lost ({how})",
            traffic,
            began,
            seconds,
            called_stale_after_s=round(told, 2),
            served_meanwhile=len(served),
        )

    return story


def fullest(it: Deployment, traffic: Conversations) -> Node:
    counts = traffic.ledger.engines()
    return max(it.nodes, key=lambda node: counts.get(node.engine(), 0))
