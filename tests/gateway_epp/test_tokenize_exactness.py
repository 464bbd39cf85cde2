"""When predictions are trusted: a pure rule over predicted and reported counts."""

from __future__ import annotations

from dynamo_epp.tokenize import Exactness, Trust
from hypothesis import given
from hypothesis import strategies as st


def feed(exactness: Exactness, outcomes: list[bool]) -> int:
    """Changes of state."""
    return sum(exactness.observe(10, 10 if match else 11) for match in outcomes)


def test_three_in_a_row_end_trust() -> None:
    exactness = Exactness()
    assert feed(exactness, [True, False, False]) == 0
    assert exactness.state is Trust.EXACT
    assert feed(exactness, [False]) == 1
    assert exactness.state is Trust.MISMATCH
    assert "10 predicted, 11 reported" in exactness.reason
    assert (exactness.matched, exactness.mismatched) == (1, 3)


def test_one_kind_of_request_among_many_ends_trust() -> None:
    exactness = Exactness()
    assert feed(exactness, [True, True, True, True, True, False] * 8) == 1
    assert exactness.state is Trust.MISMATCH


def test_a_rare_outlier_does_not() -> None:
    exactness = Exactness()
    assert feed(exactness, ([True] * 20 + [False]) * 50) == 0
    assert exactness.reason == ""


def test_recovery_takes_longer_after_each_relapse() -> None:
    exactness = Exactness()
    for needed in (16, 32, 64):
        feed(exactness, [False] * 3)
        assert exactness.state is Trust.MISMATCH
        assert exactness.recovery_after == needed
        assert feed(exactness, [True] * (needed - 1)) == 0
        assert feed(exactness, [False]) == 0  # starts over
        assert feed(exactness, [True] * needed) == 1
        assert exactness.state is Trust.EXACT


def test_probes_while_mistrusted() -> None:
    exactness = Exactness()
    assert all(exactness.predicts() for _ in range(20))
    feed(exactness, [False] * 3)
    assert sum(exactness.predicts() for _ in range(80)) == 10


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), max_size=200))
def test_unknown_counts_tell_nothing(counts: list[tuple[int, int]]) -> None:
    all_of_them, known_only = Exactness(), Exactness()
    for predicted, reported in counts:
        all_of_them.observe(predicted, reported)
        if predicted >= 0 and reported >= 0:
            known_only.observe(predicted, reported)
    assert all_of_them == known_only
