"""The judge of the tests of faults is judged first."""

from __future__ import annotations

import pytest

from e2e.faults.traffic import Attempt, Ledger, unbroken


def attempt(sent: float, **fields: object) -> Attempt:
    one = Attempt(1, 0, sent, sent + 0.05, sent + 0.1, sent + 0.2, engine=7)
    for name, value in fields.items():
        setattr(one, name, value)
    return one


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"routing": "exact;overlap=2/4;mode=kv", "cached_tokens": 32}, ""),
        ({"routing": "approximate;overlap=2/4;mode=kv", "cached_tokens": 32}, "approximate"),
        ({"routing": "", "cached_tokens": 32}, "routing told as ''"),
        (
            {"routing": "exact;overlap=2/4;mode=kv", "cached_tokens": 16},
            "said 32 cached tokens, 16 were",
        ),
        (
            {"routing": "exact;overlap=1/4;mode=kv", "cached_tokens": 16},
            "the engine had 32 tokens and found 16",
        ),
        (
            {"routing": "exact;overlap=0/4;mode=kv", "cached_tokens": 0, "engine": 8},
            "another engine has the conversation",
        ),
        ({"first": 13.0}, "late"),
    ],
)
def test_what_is_wrong_with_an_answer(fields: dict[str, object], wrong: str) -> None:
    ledger = Ledger()
    ledger.held[1][7] = 40
    assert ledger.judge(attempt(10.0, **fields)) == wrong


def test_an_engine_that_is_away_or_began_anew_holds_nothing() -> None:
    elsewhere = attempt(1.0, routing="exact;overlap=0/4;mode=kv", engine=8)
    for change in (lambda ledger: ledger.away.add(7), lambda ledger: ledger.forget(7)):
        ledger = Ledger()
        ledger.held[1][7] = 40
        change(ledger)
        assert ledger.judge(elsewhere) == ""


def test_the_row_of_right_ones_begins_behind_the_last_wrong_one() -> None:
    right, wrong = [attempt(t) for t in (1.0, 4.0, 5.0)], attempt(3.0, wrong="late")
    assert unbroken([*right, wrong], 2.0, 9.0) == (2.0, 2)
    assert unbroken(right, 2.0, 9.0) == (0.0, 2)
    young, old = (attempt(4.5, first=0.0, ended=0.0) for _ in range(2))
    assert unbroken([*right, wrong, young], 2.0, 5.0) == (2.0, 1)
    assert unbroken([*right, wrong, old], 2.0, 9.0) == (3.0, 1)
