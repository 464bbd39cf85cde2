"""Whose namespace it is: markers come, are renewed, expire."""

from __future__ import annotations

from typing import Any

from dynamo_operator.controller.scope import MarkedNamespaces, Scope
from dynamo_operator.marker import MARKER


def marker(namespace: str, renewed: str, holder: str = "restricted") -> dict[str, Any]:
    return {
        "metadata": {"name": MARKER, "namespace": namespace},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 30, "renewTime": renewed},
    }


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.changes: list[set[str]] = []
        self.marked = MarkedNamespaces(lambda: self.now, lambda c: self.changes.append(set(c)))


def test_a_marked_namespace_is_left_alone_until_its_marker_expires() -> None:
    world = World()
    world.marked.lease_changed(None, marker("a", "t0"))
    assert world.marked.marked == {"a"}
    world.now = 20
    world.marked.lease_changed(marker("a", "t0"), marker("a", "t1"))
    world.now = 45
    world.marked.look()
    assert world.marked.marked == {"a"}  # renewed at 20
    world.now = 51
    world.marked.look()
    assert world.marked.marked == frozenset()
    assert world.changes == [{"a"}, {"a"}]


def test_a_marker_that_is_taken_away_frees_at_once() -> None:
    world = World()
    world.marked.lease_changed(None, marker("a", "t0"))
    world.marked.lease_changed(marker("a", "t0"), None)
    assert world.marked.marked == frozenset()
    world.marked.lease_changed(None, marker("b", "t0", holder=""))
    assert world.marked.marked == frozenset()


def test_scopes() -> None:
    everywhere = Scope(marked=frozenset({"a"}))
    assert "b" in everywhere
    assert "a" not in everywhere
    only = Scope(frozenset({"a"}), frozenset({"a"}))
    assert "a" in only
    assert "b" not in only
