"""Merging of environment variables, against what Kubernetes does with a list of them."""

from typing import Any

from dynamo_operator.render.environment import literal, merged, number, references
from hypothesis import given
from hypothesis import strategies as st

NAMES = ["A", "B", "C", "D"]


def var(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "value": value}


def test_layers_override_by_name_and_keep_their_order() -> None:
    result = merged([var("A", "1"), var("B", "2")], [var("A", "3")], [var("C", "4")])
    assert result == [var("B", "2"), var("A", "3"), var("C", "4")]


def test_an_overriding_value_still_reaches_the_references_of_the_layer_below() -> None:
    """The graph says URL=http://$(HOST); a component says HOST: URL must come after it."""
    result = merged([var("HOST", "a"), var("URL", "http://$(HOST)")], [var("HOST", "b")])
    assert result == [var("HOST", "b"), var("URL", "http://$(HOST)")]


def test_an_override_takes_along_what_it_refers_to() -> None:
    layers = [var("HOST", "a"), var("URL", "$(HOST)")], [var("ZONE", "z"), var("HOST", "$(ZONE)")]
    assert [entry["name"] for entry in merged(*layers)] == ["ZONE", "HOST", "URL"]


def test_references_are_kubernetes_references() -> None:
    assert references("$(A)-$(B.c)") == ["A", "B.c"]
    assert list(references("$$(A) $A ${A} $( A)")) == []
    assert references("$$$(A)") == ["A"]
    assert list(references(None)) == []


def test_a_long_chain_of_references_is_no_problem() -> None:
    count = 5000
    below = [var(f"V{i}", "x") for i in range(count)]
    above = [var(f"V{i}", f"$(V{i + 1})") for i in range(count - 1)] + [var(f"V{count - 1}", "")]
    assert merged(below, above)[0] == var(f"V{count - 1}", "")


def test_a_circle_of_references_ends() -> None:
    layers = [var("A", ""), var("B", "")], [var("A", "$(B)"), var("B", "$(A)")]
    assert sorted(entry["name"] for entry in merged(*layers)) == ["A", "B"]


def test_literals_and_numbers() -> None:
    env = [var("P", "80"), var("P", "81"), {"name": "Q", "valueFrom": {}}, var("R", "²")]
    assert literal(env, "P") == "81"
    assert literal(env, "Q") is None
    assert number(env, "P", 1) == 81
    assert number(env, "R", 1) == 1
    assert number(env, "missing", 1) == 1


entry = st.builds(
    var,
    st.sampled_from(NAMES),
    st.lists(st.sampled_from([*(f"$({n})" for n in NAMES), "$$(A)", "x"]), max_size=2).map("".join),
)
layer = st.lists(entry, max_size=4)


def wanted(flat: list[dict[str, Any]]) -> dict[str, set[str]]:
    """For each name, the names that its winning entry may refer to in the concatenation."""
    winner = {entry["name"]: position for position, entry in enumerate(flat)}
    return {
        name: {
            other
            for other in references(flat[position]["value"])
            if any(e["name"] == other for e in flat[:position]) and other != name
        }
        for name, position in winner.items()
    }


def has_circle(edges: dict[str, set[str]]) -> bool:
    left = {name: set(needs) for name, needs in edges.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    return bool(left)


@given(layer, layer, layer)
def test_merge_keeps_winners_and_every_reference_that_worked(
    first: list[dict[str, Any]], second: list[dict[str, Any]], third: list[dict[str, Any]]
) -> None:
    flat = first + second + third
    result = merged(first, second, third)
    names = [entry["name"] for entry in result]
    assert len(names) == len(set(names))
    assert {entry["name"]: entry for entry in result} == {entry["name"]: entry for entry in flat}
    edges = wanted(flat)
    if not has_circle(edges):
        for name, needs in edges.items():
            assert all(names.index(other) < names.index(name) for other in needs)
