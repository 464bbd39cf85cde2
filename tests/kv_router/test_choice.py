"""The choice against Dynamo's worked example, and the laws that every mode keeps."""

import random
from collections import Counter

import pytest
from dynamo_kv_router.choice import MODES, Candidate, How, Policy, RequestSize, choose
from hypothesis import given
from hypothesis import strategies as st

SIZE = RequestSize(prompt_tokens=160, block_size=16)


def worker(name: str, **fields: object) -> Candidate:
    return Candidate(name=name, endpoint=f"127.0.0.1:{name[1:]}", **fields)  # type: ignore[arg-type]


def test_dynamos_worked_example() -> None:
    # Its documentation counts this request's own blocks in none of the three, we in each.
    decision = choose(
        SIZE,
        [
            worker("w1", overlap_blocks=2, active_decode_blocks=10),
            worker("w2", overlap_blocks=5, active_decode_blocks=5),
            worker("w3", overlap_blocks=8, active_decode_blocks=9),
        ],
        Policy(),
        random.Random(0),
    )
    assert [(s.candidate.name, s.cost - SIZE.blocks) for s in decision.ranked] == [
        ("w2", 10.0),
        ("w3", 11.0),
        ("w1", 18.0),
    ]
    assert decision.routing() == "exact;overlap=5/10;mode=kv"


def test_terms_add_up_to_the_cost() -> None:
    decision = choose(
        SIZE,
        [worker("w1", active_prefill_tokens=32, active_requests=3, overlap_blocks=1)],
        Policy(decode_active_request_weight=2.0, prefill_load_scale=0.5),
        random.Random(0),
    )
    assert decision.chosen is not None
    assert decision.terms(decision.chosen) == {"prefill": 5.5, "decode": 10.0, "requests": 6.0}
    assert decision.chosen.cost == 21.5


def test_the_decay_lowers_the_credit_of_the_busier() -> None:
    candidates = [
        worker("w1", overlap_blocks=10, active_prefill_tokens=160),
        worker("w2"),
    ]
    decision = choose(SIZE, candidates, Policy(overlap_score_credit_decay=1.0), random.Random(0))
    assert {s.candidate.name: decision.terms(s)["prefill"] for s in decision.ranked} == {
        "w1": 15.0,  # (160 + 160) / 16 − 10 / (1 + 1)
        "w2": 10.0,
    }


def test_equal_costs_fall_to_fewer_requests_then_to_the_emptier_cache() -> None:
    decision = choose(
        SIZE,
        [
            worker("w1", active_requests=1),
            worker("w2", cached_blocks=7),
            worker("w3", cached_blocks=3),
        ],
        Policy(),
        random.Random(0),
    )
    assert [s.candidate.name for s in decision.ranked] == ["w3", "w2", "w1"]


def test_equal_workers_share_alike() -> None:
    rng = random.Random(1)
    counts = Counter(
        choose(SIZE, [worker("w1"), worker("w2")], Policy(), rng).endpoints[0] for _ in range(2000)
    )
    assert all(900 < count < 1100 for count in counts.values())


def test_temperature_draws_from_the_softmax() -> None:
    rng = random.Random(2)
    policy = Policy(temperature=1.0)
    candidates = [worker("w1", overlap_blocks=10), worker("w2")]
    first = Counter(choose(SIZE, candidates, policy, rng).endpoints[0] for _ in range(4000))
    # weights e^0 and e^-1
    assert first["127.0.0.1:1"] / 4000 == pytest.approx(0.731, abs=0.03)


def test_round_robin_takes_turns() -> None:
    candidates = [worker("w2"), worker("w1"), worker("w3")]
    picks = [
        choose(SIZE, candidates, Policy(mode="round-robin"), random.Random(0), turn=turn)
        for turn in range(4)
    ]
    assert [p.endpoints[0][-1] for p in picks] == ["1", "2", "3", "1"]
    assert {p.how for p in picks} == {How.LOAD_ONLY}


def test_least_loaded_and_power_of_two_take_the_less_loaded() -> None:
    candidates = [worker("w1", active_requests=5), worker("w2", active_requests=1)]
    for mode in ("least-loaded", "power-of-two"):
        assert choose(SIZE, candidates, Policy(mode=mode), random.Random(3)).endpoints[0][-1] == "2"


def test_how_says_what_is_known() -> None:
    known, vague = worker("w1"), worker("w2", exact=False)
    rng = random.Random(0)
    assert choose(SIZE, [known], Policy(), rng).how is How.EXACT
    assert choose(SIZE, [known, vague], Policy(), rng).how is How.APPROXIMATE
    assert choose(SIZE, [known], Policy(), rng, tokens_exact=False).how is How.LOAD_ONLY


def test_nobody_eligible() -> None:
    decision = choose(SIZE, [worker("w1", dropped="not ready")], Policy(), random.Random(0))
    assert decision.chosen is None
    assert decision.endpoints == ()
    assert decision.dropped[0].dropped == "not ready"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "kvv"}, "routing mode 'kvv' is unknown"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be a number ≥ 0"),
        ({"prefill_load_scale": float("nan")}, "prefill_load_scale is nan"),
    ],
)
def test_bad_policies_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**fields)  # type: ignore[arg-type]


candidates_strategy = st.lists(
    st.builds(
        Candidate,
        name=st.text("abc", min_size=1, max_size=3),
        endpoint=st.integers(1, 10**6).map(str),
        overlap_blocks=st.integers(0, 20),
        active_prefill_tokens=st.floats(0, 1e6),
        active_decode_blocks=st.floats(0, 1e6),
        active_requests=st.floats(0, 1e4),
        dropped=st.sampled_from(["", "", "not ready"]),
    ),
    max_size=8,
    unique_by=lambda c: c.endpoint,
)


@given(candidates_strategy, st.sampled_from(sorted(MODES)), st.floats(0, 2), st.integers())
def test_every_candidate_is_either_ranked_or_dropped_once(
    candidates: list[Candidate], mode: str, temperature: float, seed: int
) -> None:
    policy = Policy(mode=mode, temperature=temperature)
    decision = choose(SIZE, candidates, policy, random.Random(seed), turn=abs(seed))
    ranked = [scored.candidate for scored in decision.ranked]
    assert Counter(c.endpoint for c in [*ranked, *decision.dropped]) == Counter(
        c.endpoint for c in candidates
    )
    assert not any(c.dropped for c in ranked)
    if mode == "kv" and temperature == 0:
        costs = [scored.cost for scored in decision.ranked]
        assert costs == sorted(costs)


def test_stock_engines_that_cost_nearly_the_same_share_the_picks() -> None:
    rng = random.Random(0)
    stock = [worker(f"w{n}", pickers=3.0, active_decode_blocks=n / 10) for n in range(8)]
    picked = Counter(choose(SIZE, stock, Policy(), rng).endpoints[0] for _ in range(1000))
    assert set(picked) == {"127.0.0.1:0", "127.0.0.1:1"}
    assert picked["127.0.0.1:0"] == pytest.approx(750, abs=60)
    cheapest = Policy(unconfirmed_spread=0.0)
    assert {choose(SIZE, stock, cheapest, rng).endpoints[0] for _ in range(100)} == {"127.0.0.1:0"}


def test_a_long_prefix_on_a_stock_engine_is_not_given_up_for_the_spread() -> None:
    stock = [worker("w0", pickers=3.0, overlap_blocks=9), worker("w1", pickers=3.0)]
    rng = random.Random(0)
    assert {choose(SIZE, stock, Policy(), rng).endpoints[0] for _ in range(100)} == {"127.0.0.1:0"}


def test_not_even_a_short_prefix_is_given_up_for_the_spread() -> None:
    stock = [worker(f"w{n}", pickers=3.0, overlap_blocks=int(n < 2)) for n in range(12)]
    rng = random.Random(0)
    picked = {choose(SIZE, stock, Policy(), rng).endpoints[0] for _ in range(100)}
    assert picked == {"127.0.0.1:0", "127.0.0.1:1"}


def test_the_only_picker_takes_the_cheapest() -> None:
    ours = [worker(f"w{n}", active_decode_blocks=n / 10) for n in range(8)]
    rng = random.Random(0)
    assert {choose(SIZE, ours, Policy(), rng).endpoints[0] for _ in range(100)} == {"127.0.0.1:0"}
