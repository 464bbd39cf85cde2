"""Prefill and decode picked together: generations, thresholds, and no silent way out."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from dynamo_epp.scheduling.disagg import (
    DisaggPolicy,
    Pairing,
    Split,
    Why,
    draw,
    pair,
    weights,
)
from dynamo_kv_router.choice import Candidate, Decision, Policy, RequestSize, choose
from hypothesis import given
from hypothesis import strategies as st

BLOCK = 16
SIZE = RequestSize(160, BLOCK)


def worker(name: str, role: str, generation: str = "g", **more: Any) -> Candidate:
    return Candidate(name, f"{name}:8000", role=role, generation=generation, **more)


def picked(
    candidates: Sequence[Candidate],
    policy: DisaggPolicy | None = None,
    *,
    splittable: bool = True,
    can_sign: bool = True,
    seed: int = 0,
) -> Pairing:
    rng = random.Random(seed)

    def rank(among: Sequence[Candidate], _: Candidate | None) -> Decision:
        return choose(SIZE, among, Policy(), rng)

    return pair(
        candidates, rank, policy or DisaggPolicy(), rng, splittable=splittable, can_sign=can_sign
    )


def chosen(pairing: Pairing) -> str:
    assert pairing.decode.chosen is not None
    return pairing.decode.chosen.candidate.name


def test_workers_without_roles_are_ranked_as_ever() -> None:
    pairing = picked([worker("a", "worker", "g1"), worker("b", "worker", "g2", overlap_blocks=9)])
    assert (pairing.split, pairing.prefill, chosen(pairing)) == (None, None, "b")
    assert pairing.routing() == "exact;overlap=9/10;mode=kv"


def test_both_workers_go_by_their_own_cache_and_load() -> None:
    pairing = picked(
        [
            worker("p0", "prefill", overlap_blocks=3),
            worker("p1", "prefill", overlap_blocks=8),
            worker("d0", "decode", active_decode_blocks=50),
            worker("d1", "decode"),
        ]
    )
    assert (pairing.split, pairing.why) == (Split.PREFILL_DECODE, None)
    assert chosen(pairing) == "d1"
    assert pairing.prefillers == ("p1:8000", "p0:8000")
    assert {c.name: c.dropped for c in pairing.decode.dropped} == {
        "p0": "prefill role",
        "p1": "prefill role",
    }
    assert pairing.routing() == "exact;overlap=0/10;mode=kv;disagg=prefill-decode;prefill=8/10"


def test_a_generation_weighs_as_much_as_its_scarcest_role() -> None:
    candidates = [
        *(worker(f"op{n}", "prefill", "old") for n in range(1)),
        *(worker(f"od{n}", "decode", "old") for n in range(4)),
        *(worker(f"np{n}", "prefill", "new") for n in range(3)),
        *(worker(f"nd{n}", "decode", "new") for n in range(3)),
        worker("w", "worker", "plain"),
    ]
    assert weights(candidates) == {"new": 3, "old": 1, "plain": 1}
    drawn = Counter(picked(candidates, seed=seed).generation for seed in range(1000))
    assert 520 < drawn["new"] < 680
    assert 140 < drawn["old"] < 260


def test_while_a_generation_has_no_prefiller_another_serves() -> None:
    candidates = [
        worker("od", "decode", "old", overlap_blocks=10),
        worker("op", "prefill", "old", dropped="not ready"),
        worker("nd", "decode", "new"),
        worker("np", "prefill", "new"),
    ]
    for seed in range(20):
        pairing = picked(candidates, DisaggPolicy(enforce=True), seed=seed)
        assert (chosen(pairing), pairing.prefillers) == ("nd", ("np:8000",))


@pytest.mark.parametrize(
    ("present", "more", "why", "degraded"),
    [
        (("prefill-down", "decode"), {}, Why.NO_PREFILLER, True),
        (("decode",), {}, Why.NO_PREFILLER, True),
        (("prefill", "decode"), {"can_sign": False}, Why.NO_SECRET, True),
        (("prefill", "decode"), {"splittable": False}, Why.NOT_SPLITTABLE, False),
        (("prefill", "worker"), {}, Why.AGGREGATED_WORKER, False),
    ],
)
@pytest.mark.parametrize("enforce", [False, True])
def test_what_is_not_split_says_why_and_enforce_refuses_what_nobody_wished(
    present: tuple[str, ...], more: dict[str, Any], why: Why, degraded: bool, enforce: bool
) -> None:
    kinds = {
        "prefill": worker("p", "prefill"),
        "prefill-down": worker("p", "prefill", dropped="not ready"),
        "decode": worker("d", "decode"),
        "worker": worker("w", "worker"),
    }
    candidates = [kinds[kind] for kind in present]
    pairing = picked(candidates, DisaggPolicy(enforce=enforce), **more)
    refused = enforce and degraded
    assert pairing.split is (Split.REFUSED if refused else Split.DECODE_ONLY)
    assert (pairing.why, pairing.prefillers) == (why, ())
    assert pairing.routing().endswith(f";disagg={pairing.split}({why})")


@pytest.mark.parametrize(
    ("cached_blocks", "threshold", "ratio", "split"),
    [
        (9, 17, 0.7, Split.DECODE_ONLY),  # 16 uncached
        (9, 16, 0.7, Split.PREFILL_DECODE),
        (9, 17, 0.1, Split.PREFILL_DECODE),  # a tenth of the prompt is uncached
        (10, 1, 0.7, Split.DECODE_ONLY),
        (0, 2048, 0.7, Split.PREFILL_DECODE),  # short, but nothing of it is cached
        (0, 2048, 1.0, Split.PREFILL_DECODE),
    ],
)
def test_a_decode_worker_prefills_what_little_is_left(
    cached_blocks: int, threshold: int, ratio: float, split: Split
) -> None:
    candidates = [
        worker("p", "prefill"),
        worker("d", "decode", overlap_blocks=cached_blocks),
    ]
    policy = DisaggPolicy(
        conditional=True, eff_isl_threshold=threshold, eff_isl_ratio_threshold=ratio
    )
    assert picked(candidates, policy).split is split
    assert picked(candidates).split is Split.PREFILL_DECODE  # off by default


CANDIDATES = st.lists(
    st.builds(
        worker,
        st.sampled_from("abcdefgh"),
        st.sampled_from(["worker", "prefill", "decode"]),
        st.sampled_from(["", "g1", "g2"]),
        dropped=st.sampled_from(["", "", "not ready"]),
        overlap_blocks=st.integers(0, 10),
    ),
    max_size=10,
    unique_by=lambda candidate: candidate.name,
)


@given(CANDIDATES, st.booleans(), st.booleans(), st.integers(0, 9))
def test_no_pair_is_across_generations_and_nothing_is_silent(
    candidates: list[Candidate], enforce: bool, conditional: bool, seed: int
) -> None:
    policy = DisaggPolicy(enforce, conditional)
    pairing = picked(candidates, policy, seed=seed)
    split_graph = any(c.role != "worker" for c in candidates)
    assert (pairing.split is not None) is split_graph
    seen = [s.candidate for s in pairing.decode.ranked] + [*pairing.decode.dropped]
    assert sorted(c.name for c in seen) == sorted(c.name for c in candidates)
    if pairing.decode.chosen is None:
        return
    answers = pairing.decode.chosen.candidate
    assert answers.role != "prefill"
    if pairing.prefillers:
        assert pairing.prefill is not None
        for scored in pairing.prefill.ranked:
            assert (scored.candidate.role, answers.role) == ("prefill", "decode")
            assert scored.candidate.generation == answers.generation == pairing.generation
    elif split_graph:
        assert pairing.why is not None
    # A way to serve both phases is taken wherever there is one.
    ready = {(c.generation, c.role) for c in candidates if not c.dropped}
    could = any({(g, "prefill"), (g, "decode")} <= ready for g in ("", "g1", "g2"))
    if could:
        assert pairing.why is not Why.NO_PREFILLER
        assert pairing.split is not Split.REFUSED


def test_a_draw_of_nothing_is_nothing() -> None:
    assert draw({}, random.Random(0)) == ""


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "--router-conditional-disagg-config '{'"),
        ('{"eff_isl": 1}', "eff_isl"),
        ('{"policy": "isl_or_load"}', "policy 'isl_or_load' is not available; use isl_bounding"),
        ('{"eff_isl_threshold": -1}', "eff_isl_threshold is -1"),
        ('{"eff_isl_ratio_threshold": 7}', "eff_isl_ratio_threshold is 7"),
    ],
)
def test_mistakes_in_the_thresholds_are_named(config: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        DisaggPolicy.read(enforce=False, conditional=True, config=config)


def test_dynamos_thresholds_are_read() -> None:
    config = '{"policy":"isl_bounding","eff_isl_threshold":4096,"eff_isl_ratio_threshold":0.6}'
    read = DisaggPolicy.read(enforce=True, conditional=True, config=config)
    assert read == DisaggPolicy(True, True, 4096, 0.6)
    assert DisaggPolicy.read(enforce=False, conditional=False, config="") == DisaggPolicy()
