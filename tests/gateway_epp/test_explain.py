"""The journal: what is kept of decisions and refusals, and what can be asked of it."""

import random
from dataclasses import replace

import pytest
from dynamo_epp.explain import Entry, Journal, Kept, Refused
from dynamo_epp.explain.compact import RANKED_LOWER, WHOLE
from dynamo_epp.explain.entries import LONGEST, LONGEST_REASON
from dynamo_kv_router.choice import Candidate, Decision, Policy, RequestSize, choose
from hypothesis import given
from hypothesis import strategies as st

REASONS = ("", "", "", "not ready", "draining", "terminating")


def decision(workers: int, seed: int = 0, decay: float = 0.5) -> Decision:
    rng = random.Random(seed)
    candidates = [
        Candidate(
            name=f"w-{number}",
            endpoint=f"10.0.0.{number}:8000",
            overlap_blocks=rng.randrange(8),
            active_prefill_tokens=rng.random() * 1000,
            active_decode_blocks=float(rng.randrange(100)),
            active_requests=float(rng.randrange(9)),
            dropped=rng.choice(REASONS),
        )
        for number in range(workers)
    ]
    policy = Policy(overlap_score_credit_decay=decay)
    return choose(RequestSize(128, 16), candidates, policy, rng)


def entry(request_id: str, at: float = 0.0, model: str = "m", workers: int = 3) -> Entry:
    return Entry(
        request_id=request_id,
        time=at,
        path="/v1/chat/completions",
        model=model,
        stream=False,
        kept=Kept.of(decision(workers)),
        reason="",
        prompt_tokens=128,
        stages_ms={},
    )


def refused(request_id: str, at: float = 0.0, model: str = "m") -> Refused:
    return Refused(request_id, at, "/v1/completions", model, "bad-request", "no")


@given(workers=st.integers(0, WHOLE), seed=st.integers(0, 1000))
def test_a_decision_among_few_comes_back_whole(workers: int, seed: int) -> None:
    made = decision(workers, seed)
    kept = Kept.of(made)
    assert kept.unpack() == made
    assert kept.chosen == made.chosen
    assert not kept.left_out


@given(workers=st.integers(WHOLE + 1, 200), seed=st.integers(0, 1000))
def test_of_many_candidates_those_are_kept_that_tell_why(workers: int, seed: int) -> None:
    made = decision(workers, seed)
    kept = Kept.of(made)
    back = kept.unpack()
    assert len(back.ranked) + len(back.dropped) <= WHOLE
    assert back.chosen == made.chosen
    assert back.ranked[:20] == made.ranked[:20]
    assert {c.dropped for c in back.dropped} == {c.dropped for c in made.dropped}
    total = len(back.ranked) + len(back.dropped) + sum(kept.left_out.values())
    assert total == workers
    assert kept.left_out.get(RANKED_LOWER, 0) == len(made.ranked) - len(back.ranked)
    # The terms of those that are kept are as they were, though they depend on all.
    for scored in back.ranked:
        assert back.terms(scored) == made.terms(scored)
        assert sum(back.terms(scored).values()) == pytest.approx(scored.cost)


def test_an_entry_tells_what_was_left_out() -> None:
    told = entry("r", workers=100).to_json()
    shown = len(told["candidates"])
    assert shown <= WHOLE
    assert shown + sum(told["left_out"].values()) == 100
    assert told["candidates"][0]["terms"].keys() == {"prefill", "decode", "requests"}


def test_refusals_push_no_decision_out() -> None:
    journal = Journal(capacity=8)
    journal.add(entry("went"))
    for number in range(100):
        journal.refuse(refused(f"no-{number}"))
    assert journal.get("went") is not None
    assert journal.find("no-0") is None
    assert [each.request_id for each in journal.newest(100)] == ["went", "no-99", "no-98"]


def test_the_newest_are_first_whatever_became_of_them() -> None:
    journal = Journal()
    journal.add(entry("a", 1))
    journal.refuse(refused("b", 2))
    journal.add(entry("c", 3))
    assert [each.request_id for each in journal.newest(2)] == ["c", "b"]


def test_a_filter_looks_at_the_pick_at_who_answered_and_at_the_model() -> None:
    journal = Journal()
    journal.add(entry("a", 1))
    journal.add(entry("b", 2, model="other"))
    journal.refuse(refused("c", 3, model="other"))
    worker = journal.newest(1)
    assert next(worker).request_id == "c"
    picked = entry("x").worker
    moved = entry("d", 4)
    moved.outcome["served_by"] = "w-elsewhere"
    journal.add(moved)
    assert [e.request_id for e in journal.newest(9, worker=picked)] == ["d", "b", "a"]
    assert [e.request_id for e in journal.newest(9, worker="w-elsewhere")] == ["d"]
    assert [e.request_id for e in journal.newest(9, model="other")] == ["c", "b"]
    assert [e.request_id for e in journal.newest(9, model="other", worker=picked)] == ["b"]


def test_an_id_that_is_used_again_stands_for_the_request_that_went_somewhere() -> None:
    journal = Journal()
    journal.refuse(refused("r"))
    journal.add(entry("r", 1))
    journal.refuse(refused("r", 2))
    found = journal.find("r")
    assert isinstance(found, Entry)
    assert len(list(journal.newest(9))) == 1


def test_what_clients_write_is_kept_only_so_far() -> None:
    long = "x" * 10_000
    kept = Refused("r", 0.0, "/" + long, long, "unknown-model", f"The model {long} is not there.")
    assert len(kept.path) == len(kept.model) == LONGEST
    assert len(kept.message) == LONGEST_REASON
    decided = replace(entry("r"), path="/" + long, reason=f"a part of type {long}")
    assert (len(decided.path), len(decided.reason)) == (LONGEST, LONGEST_REASON)


def test_a_refusal_has_the_fields_of_a_decision() -> None:
    assert refused("r").to_json().keys() == entry("r").to_json().keys()
