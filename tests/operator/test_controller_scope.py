"""Whose namespace it is: markers come, are renewed, expire."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dynamo_operator.controller import scope
from dynamo_operator.controller.scope import MarkedNamespaces, OwnMarkers
from dynamo_operator.marker import MARKER
from dynamo_runtime.kubernetes.client import ApiUnreachable


def marker(namespace: str, renewed: str, holder: str = "restricted") -> dict[str, Any]:
    return {
        "metadata": {"name": MARKER, "namespace": namespace},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 30, "renewTime": renewed},
    }


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.lease: dict[str, Any] | None = None
        """What the API server has; the watch may be behind."""
        self.reachable = True
        self.changes: list[str] = []
        self.marked = MarkedNamespaces(lambda: self.now, self.read, self.changes.append)

    async def read(self, namespace: str) -> dict[str, Any] | None:
        if not self.reachable:
            raise ApiUnreachable("no answer")
        return self.lease

    def sees(self, lease: dict[str, Any]) -> None:
        self.marked.lease_changed(self.lease, lease)
        self.lease = lease


async def test_a_marked_namespace_is_left_alone_until_its_marker_expires() -> None:
    world = World()
    world.sees(marker("a", "t0"))
    assert world.marked.marked == {"a"}
    world.now = 20
    world.sees(marker("a", "t1"))
    world.now = 45
    await world.marked.look()
    assert world.marked.marked == {"a"}  # renewed at 20
    world.now = 51
    await world.marked.look()
    assert world.marked.marked == frozenset()
    world.sees(marker("a", "t2"))
    assert world.marked.marked == {"a"}
    assert world.changes == ["a", "a", "a"]


async def test_silence_of_the_watch_is_no_sign_that_a_marker_expired() -> None:
    world = World()
    world.sees(marker("a", "t0"))
    world.lease = marker("a", "t1")  # renewed, and nobody was told
    world.now = 31
    await world.marked.look()
    assert world.marked.marked == {"a"}
    world.reachable = False
    world.now = 100
    await world.marked.look()
    assert world.marked.marked == {"a"}, "who can't ask takes nothing"
    world.reachable = True
    await world.marked.look()
    assert world.marked.marked == frozenset()


async def test_a_marker_that_is_taken_away_frees_at_once() -> None:
    world = World()
    world.sees(marker("a", "t0"))
    world.marked.lease_changed(world.lease, None)
    assert world.marked.marked == frozenset()
    world.sees(marker("b", "t0", holder=""))
    assert world.marked.marked == frozenset()
    world.sees(marker("b", "t1"))
    assert world.marked.marked == {"b"}
    world.lease = None
    world.now = 31
    await world.marked.look()
    assert world.marked.marked == frozenset()


def test_a_namespace_is_ours_once_others_have_seen_its_marker_and_while_it_is_renewed() -> None:
    now = 0.0
    own = OwnMarkers(["a"], lambda: now, lambda namespace: None)
    assert not own.stands("a")
    assert own.renewed("a", now)
    assert not own.stands("a")  # somebody may still be at work there
    now = 3.0
    assert own.stands("a")
    assert not own.stands("b")
    now = 10.0
    assert not own.renewed("a", now)
    now = 39.0
    assert own.stands("a")
    now = 40.0
    assert not own.stands("a")  # by now others may have taken it over
    assert own.renewed("a", now)
    assert not own.stands("a")
    now = 43.0
    assert own.stands("a")
    now = 60.0
    assert not own.renewed("a", sent=50.0)  # the answer took its time
    now = 79.0
    assert own.stands("a")
    now = 80.0
    assert not own.stands("a")  # others count from when they saw it


async def test_who_is_told_that_a_namespace_is_ours_finds_it_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the loop's timers fire early by the clock that decides."""
    monkeypatch.setattr(scope, "SETTLE_S", 0.05)
    loop = asyncio.get_running_loop()
    told: asyncio.Future[bool] = loop.create_future()
    slow = OwnMarkers(
        ["a"], lambda: loop.time() / 2, lambda namespace: told.set_result(slow.stands(namespace))
    )
    slow._on_renewed("a", loop.time() / 2)
    assert await told
