"""The sentences that say why one worker was picked and the others were not."""

import random

from dynamo_epp.explain.reasons import why
from dynamo_kv_router.choice import (
    Candidate,
    Decision,
    How,
    Policy,
    RequestSize,
    Scored,
    choose,
)

SIZE = RequestSize(64, 16)


def worker(name: str, **load: float) -> Candidate:
    return Candidate(name=name, endpoint="10.0.0.1:8000", **load)  # type: ignore[arg-type]


def reasons(*candidates: Candidate, policy: Policy | None = None, seed: int = 0) -> list[str]:
    decision = choose(SIZE, candidates, policy or Policy(), random.Random(seed))
    return why(decision)


def test_nobody_and_one_alone() -> None:
    assert reasons(worker("a", dropped="draining")) == []  # type: ignore[arg-type]
    assert reasons(worker("a")) == ["the only one that could be chosen"]


def test_a_dearer_one_says_by_how_much_and_in_which_term() -> None:
    cheap, dear = worker("a", overlap_blocks=3), worker("b", active_decode_blocks=2.5)
    assert reasons(dear, cheap) == [
        "lowest: cost 5 blocks = prefill 1 + decode 4",
        "5.5 blocks more: prefill +3, decode +2.5",
    ]


def test_equal_costs_say_what_broke_the_tie() -> None:
    idle, busy = worker("a"), worker("b", active_requests=1)
    assert reasons(busy, idle)[1] == "the same cost; more requests in hand"
    assert reasons(worker("a", cached_blocks=5), idle)[1] == "the same cost; a fuller cache"
    assert reasons(worker("b"), idle)[1] == "the same cost; chance decided"


def test_a_draw_against_the_cost_says_so() -> None:
    candidates = (worker("a", overlap_blocks=3), worker("b"))
    policy = Policy(temperature=100.0)
    told = [reasons(*candidates, policy=policy, seed=seed) for seed in range(20)]
    assert ["drawn at temperature 100: cost 8 blocks = prefill 4 + decode 4",
            "3 blocks cheaper, but not drawn"] in told  # fmt: skip


def test_other_modes_have_no_terms() -> None:
    assert reasons(worker("a"), worker("b"), policy=Policy(mode="round-robin")) == [
        "first by round-robin",
        "ranked lower by round-robin",
    ]


def test_a_profile_has_scores_and_the_highest_wins() -> None:
    best, other, same = (
        Scored(worker(name), cost, scores)
        for name, cost, scores in (
            ("a", -2.5, (1.0, 0.5)),
            ("b", -1.25, (0.5, 0.25)),
            ("c", -2.5, (1.0, 0.5)),
        )
    )
    decision = Decision(
        SIZE, Policy(), How.EXACT, (best, same, other), (),
        profile="default", scorers=(("prefix", 2.0), ("queue", 1.0)),
    )  # fmt: skip
    assert why(decision) == [
        "highest: score 2.5 = prefix 2 + queue 0.5",
        "the same score",
        "1.25 lower: prefix -1, queue -0.25",
    ]
