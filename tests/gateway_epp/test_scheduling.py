"""Filters, scorers and pickers, each by its formula; and what profiles make of them."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.scheduling.approximate import ApproximateParameters, ApproximatePrefixes
from dynamo_epp.scheduling.ask import Ask, Prefixes
from dynamo_epp.scheduling.candidates import candidates
from dynamo_epp.scheduling.catalogue import MADE, make
from dynamo_epp.scheduling.plugin import Filter, Picker, Scorer
from dynamo_epp.scheduling.profile import Profile
from dynamo_epp.scheduling.scheduler import Scheduler
from dynamo_epp.scheduling.sessions import LONGEST_NAME, token_of
from dynamo_epp.scheduling.topology import Topology
from dynamo_kv_router.choice import Candidate, How, RequestSize
from dynamo_kv_router.engine_metrics import EngineFigures
from dynamo_kv_router.index import BlockIndex
from dynamo_kv_router.load import WorkerLoad
from dynamo_runtime.endpoint import Endpoint
from hypothesis import given, settings
from hypothesis import strategies as st

NOW = 100.0
Told = tuple[int, int, float]  # running, waiting, cache usage


def worker(
    number: int,
    *,
    told: Told | None = (0, 0, 0.0),
    told_at: float = NOW,
    sent: int = 0,
    role: str = "worker",
    tracked: bool = True,
    loras: Sequence[str] = (),
    figures: EngineFigures | None = None,
    **labels: str,
) -> Worker:
    endpoint = Endpoint(
        f"w-{number}", f"10.0.0.{number + 1}", 8000, role=role, ready=True, labels=labels
    )
    made = Worker(endpoint, number, WorkerLoad(block_size=16, confirms=False))
    made.model, made.models, made.loras = "m", frozenset({"m", *loras}), frozenset(loras)
    made.block_size, made.total_blocks = 16, 100
    made.live = made.exact = True
    made.tracked = tracked
    if figures is not None or told is not None:
        figures = figures or EngineFigures(*(told or (0, 0, 0.0)), 0.0)
        made.load.observe(figures, round(100 * figures.cache_usage), 100, told_at)
    for key in range(sent):
        made.load.book(str(key), 160, 0, NOW)
    return made


def ask(workers: Sequence[Worker], **fields: Any) -> Ask:
    given: dict[str, Any] = {
        "model": "m",
        "size": RequestSize(160, 16),
        "now": NOW,
        "tokens": np.arange(160, dtype=np.uint32),
    }
    made = Ask(workers={each.name: each for each in workers}, **given | fields)
    made.prefixes = Prefixes(made, ApproximatePrefixes())
    return made


def seen(workers: Sequence[Worker], overlaps: Sequence[int] = ()) -> list[Candidate]:
    depths = {each.slot: depth for each, depth in zip(workers, overlaps, strict=False)}
    matched = {("m", "", 16): depths}
    return candidates(workers, "m", matched, BlockIndex(), NOW)


def plugin(type_: str, **parameters: Any) -> Any:
    model = MADE[type_].parameters
    return make(type_, model.model_validate(parameters, by_alias=True), Topology())


def scores(
    type_: str, workers: Sequence[Worker], overlaps: Sequence[int] = (), **parameters: Any
) -> list[float]:
    scorer: Scorer = plugin(type_, **parameters)
    found = scorer.scores(ask(workers), seen(workers, overlaps))
    return [round(score, 4) for score in found]


def kept(rule: Filter, asked: Ask, workers: Sequence[Worker]) -> list[int]:
    reasons = rule.reasons(asked, seen(workers))
    return [at for at, reason in enumerate(reasons) if not reason]


# --- scorers


def test_queue_scorer_is_min_max_and_counts_what_was_sent_since() -> None:
    workers = [worker(0, told=(0, 4, 0)), worker(1, told=(0, 2, 0), sent=1), worker(2)]
    assert scores("queue-scorer", workers) == [0.0, 0.25, 1.0]
    assert scores("queue-scorer", [worker(0), worker(1)]) == [1.0, 1.0]


def test_unknown_and_old_figures_count_as_the_worst_known() -> None:
    workers = [
        worker(0, told=(0, 4, 0)),
        worker(1, told=None),
        worker(2),
        worker(3, told_at=NOW - 6),
    ]
    assert scores("queue-scorer", workers) == [0.0, 0.0, 1.0, 0.0]
    assert scores("queue-scorer", [worker(0, told=None), worker(1, told=None)]) == [1.0, 1.0]


def test_running_requests_and_cache_use() -> None:
    workers = [worker(0, told=(8, 0, 0.25)), worker(1, told=(2, 0, 0.75)), worker(2)]
    assert scores("running-requests-size-scorer", workers) == [0.0, 0.75, 1.0]
    assert scores("kv-cache-utilization-scorer", workers) == [0.75, 0.25, 1.0]


def test_load_aware_is_half_for_an_empty_queue() -> None:
    workers = [worker(0), worker(1, told=(0, 64, 0)), worker(2, told=(0, 500, 0))]
    assert scores("load-aware-scorer", workers) == [0.5, 0.25, 0.0]


def test_prefix_is_the_cached_share_or_a_length() -> None:
    workers = [worker(0), worker(1)]
    assert scores("prefix-cache-scorer", workers, [5, 10]) == [0.5, 1.0]
    assert scores(
        "prefix-cache-scorer",
        workers,
        [5, 10],
        matchLengthWeight=1.0,
        matchLengthScaleTokens=160,
    ) == [0.25, 1.0]


def test_lora_affinity() -> None:
    def told(running: set[str], waiting: set[str]) -> EngineFigures:
        return EngineFigures(1, 0, 0.0, 0.0, frozenset(running), frozenset(waiting), 2)

    workers = [
        worker(0, loras=["a"], figures=told({"a"}, set())),
        worker(1, loras=["a"], figures=told({"b"}, set())),
        worker(2, loras=["a"], figures=told({"b", "c"}, {"a"})),
        worker(3, loras=["a"], figures=told({"b", "c"}, set())),
        worker(4, loras=["a"]),
    ]
    scorer: Scorer = plugin("lora-affinity-scorer")
    found = scorer.scores(ask(workers, model="a"), seen(workers))
    assert found == [1.0, 0.8, 0.6, 0.0, 0.8]


def test_active_requests_and_tokens_in_hand() -> None:
    workers = [worker(0, sent=4), worker(1, sent=1), worker(2)]
    assert scores("active-request-scorer", workers) == [0.0, 0.75, 1.0]
    assert scores("active-request-scorer", workers, idleThreshold=1, maxBusyScore=0.5) == [
        0.0,
        1.0,
        1.0,
    ]
    assert scores("token-load-scorer", workers, [0, 0, 10], queueThresholdTokens=1600) == [
        0.5,
        0.8,
        1.0,
    ]


def test_context_length_prefers_narrow_ranges_with_headroom() -> None:
    label = "llm-d.ai/context-length-range"
    workers = [
        worker(0, **{label: "0-1000"}),
        worker(1, **{label: "0-100000"}),
        worker(2, **{label: "1160-2000"}),
        worker(3),
        worker(4, **{label: "many"}),
    ]
    found = scores("context-length-aware", workers)
    assert found[0] == round(0.3 + 0.7 * (0.7 / 1.1 + 0.3 * 840 / 1000), 4)
    assert found[0] > found[1] > found[2] == 0.15
    assert found[3:] == [0.5, 0.0]
    rule: Filter = plugin("context-length-aware", enableFiltering=True)
    assert kept(rule, ask(workers), workers) == [0, 1, 3]


def test_header_label_affinity() -> None:
    workers = [worker(0, tier="gold"), worker(1)]
    scorer: Scorer = plugin("header-label-affinity-scorer", headerName="X-Tier", labelKey="tier")
    assert scorer.scores(ask(workers, headers={"x-tier": "gold"}), seen(workers)) == [1.0, 0.0]
    assert scorer.scores(ask(workers), seen(workers)) == [0.0, 0.0]


def test_topology_by_the_nearest_shared_level() -> None:
    host, zone = "kubernetes.io/hostname", "topology.kubernetes.io/zone"
    workers = [
        worker(0, **{host: "a", zone: "z"}),
        worker(1, **{host: "b", zone: "z"}),
        worker(2, **{zone: "y"}),
    ]
    peer = worker(9, **{host: "a", zone: "z"})
    scorer: Scorer = plugin("topology-affinity-scorer")
    assert scorer.scores(ask(workers, peer=peer), seen(workers)) == [1.0, 0.05, 0.0]
    assert scorer.scores(ask(workers), seen(workers)) == [0.0, 0.0, 0.0]
    rule: Filter = plugin("topology-affinity-filter", minAffinity="zone")
    assert kept(rule, ask(workers, peer=peer), workers) == [0, 1]
    assert kept(plugin("topology-affinity-filter"), ask(workers, peer=worker(8)), workers) == [
        0,
        1,
        2,
    ]


def test_cold_prompts_go_to_whoever_got_none_for_the_longest_time() -> None:
    workers = [worker(0), worker(1), worker(2)]
    profile = Profile("p", (), (("s", 1.0, plugin("no-hit-lru-scorer")),), picker())
    scheduler = Scheduler({"p": profile}, "p")
    rng, order = random.Random(0), []
    for _ in range(6):
        asked = ask(workers)
        decision = scheduler.decide(asked, seen(workers), rng)
        scheduler.picked(asked, decision)
        order.append(decision.endpoints[0])
    assert order[:3] == order[3:]
    assert len(set(order)) == 3


def test_the_kv_cost_is_a_scorer_too() -> None:
    workers = [worker(0), worker(1), worker(2, sent=1)]
    assert scores("kv-cost-scorer", workers, [10, 0, 0]) == [1.0, 0.6667, 0.0]


@pytest.mark.parametrize("type_", sorted(t for t in MADE if t.endswith("-scorer")))
@settings(max_examples=25)
@given(
    told=st.lists(
        st.none() | st.tuples(st.integers(0, 50), st.integers(0, 50), st.floats(0, 1)),
        min_size=1,
        max_size=6,
    ),
    overlap=st.integers(0, 10),
)
def test_scores_are_finite_and_in_range(type_: str, told: list[Told | None], overlap: int) -> None:
    needed: dict[str, dict[str, Any]] = {
        "header-label-affinity-scorer": {"headerName": "a", "labelKey": "b"},
        "endpoint-attribute-scorer": {
            "attributeKey": "WaitingQueueSize",
            "algorithm": {"type": "linear_lower_is_better"},
        },
    }
    workers = [worker(at, told=each, sent=at % 3) for at, each in enumerate(told)]
    found = scores(type_, workers, [overlap] * len(workers), **needed.get(type_, {}))
    assert len(found) == len(workers)
    assert all(0.0 <= score <= 1.0 for score in found)


# --- filters


def test_label_selector() -> None:
    workers = [worker(0, app="a", gpu="h100"), worker(1, app="a"), worker(2, app="b")]
    rule = plugin("label-selector-filter", matchLabels={"app": "a"})
    assert kept(rule, ask(workers), workers) == [0, 1]
    for operator, values, left in (
        ("In", ["h100"], [0]),
        ("NotIn", ["h100"], [1, 2]),
        ("Exists", [], [0]),
        ("DoesNotExist", [], [1, 2]),
    ):
        expression = {"key": "gpu", "operator": operator, "values": values}
        rule = plugin("label-selector-filter", matchExpressions=[expression])
        assert kept(rule, ask(workers), workers) == left


def test_roles_by_label_or_by_the_endpoint() -> None:
    workers = [
        worker(0),
        worker(1, role="decode"),
        worker(2, **{"llm-d.ai/role": "prefill"}),
        worker(3, **{"llm-d.ai/role": "both"}),
    ]
    assert kept(plugin("decode-filter"), ask(workers), workers) == [0, 1, 3]
    assert kept(plugin("prefill-filter"), ask(workers), workers) == [0, 2, 3]
    assert kept(plugin("encode-filter"), ask(workers), workers) == []


def test_roles_are_told_and_left_to_the_pairing() -> None:
    workers = [worker(0), worker(1, role="prefill")]
    found = candidates(workers, "m", {}, BlockIndex(), NOW)
    told = [(candidate.role, candidate.dropped) for candidate in found]
    assert told == [("worker", ""), ("prefill", "")]


def test_utilization_filter_fails_open_for_what_is_not_known() -> None:
    workers = [worker(0, told=(0, 9, 0)), worker(1), worker(2, told=None), worker(3, sent=9)]
    conditions = [{"metric": "waiting-queue", "maxValue": 8}]
    rule = plugin("utilization-filter", conditions=conditions)
    assert kept(rule, ask(workers), workers) == [1, 2, 3]
    conditions = [{"metric": "active-requests", "maxValue": 8}]
    rule = plugin("utilization-filter", conditions=conditions)
    assert kept(rule, ask(workers), workers) == [1, 2]
    rule = plugin(
        "utilization-filter",
        conditions=[{"metric": "active-requests", "maxValue": 0}],
        fallbackOnEmpty=True,
    )
    assert kept(rule, ask([workers[3]]), [workers[3]]) == [0]


def test_endpoint_attributes() -> None:
    workers = [worker(0, told=(0, 0, 0.9)), worker(1), worker(2, told=None)]
    algorithm = {"type": "threshold", "threshold": {"operator": "LessThan", "value": 0.5}}
    parameters: dict[str, Any] = {"attribute": "KVCacheUsagePercent", "algorithm": algorithm}
    assert kept(plugin("endpoint-attribute-filter", **parameters), ask(workers), workers) == [1, 2]
    rule = plugin("endpoint-attribute-filter", **parameters, onMissing="Fail")
    assert kept(rule, ask(workers), workers) == [1]
    linear: dict[str, Any] = {"type": "linear_lower_is_better"}
    assert scores(
        "endpoint-attribute-scorer",
        workers,
        attributeKey="KVCacheUsagePercent",
        algorithm=linear,
    ) == [0.0, 1.0, 0.0]


def test_sessions_stay_until_their_worker_is_gone() -> None:
    workers = [worker(0), worker(1), worker(2)]
    rule = plugin("session-affinity-filter", strategy="session_id")
    scheduler = Scheduler({"p": Profile("p", (("s", rule),), (), picker())}, "p")
    rng = random.Random(0)

    def pick(session: str, here: Sequence[Worker], now: float = NOW) -> str:
        asked = ask(here, headers={"x-session-id": session}, now=now)
        decision = scheduler.decide(asked, seen(here), rng)
        scheduler.picked(asked, decision)
        assert decision.chosen is not None
        return decision.chosen.candidate.name

    first = pick("one", workers)
    assert {pick("one", workers) for _ in range(20)} == {first}
    left = [each for each in workers if each.name != first]
    second = pick("one", left)
    assert {pick("one", workers) for _ in range(20)} == {second}
    assert len({pick("one", workers, NOW + 301 * turn) for turn in range(1, 30)}) > 1


def test_a_session_has_a_worker_for_each_part_of_its_requests() -> None:
    decoders, prefillers = [worker(0), worker(1)], [worker(2), worker(3)]
    rule = plugin("session-affinity-filter", strategy="session_id")
    profiles = {name: Profile(name, (("s", rule),), (), picker()) for name in ("decode", "prefill")}
    scheduler = Scheduler(profiles, "decode")
    rng, picked = random.Random(0), set()
    for _ in range(10):
        asked = ask([*decoders, *prefillers], headers={"x-session-id": "one"})
        both = [
            scheduler.decide(asked, seen(decoders), rng),
            scheduler.decide(asked, seen(prefillers), rng, profile="prefill"),
        ]
        for decision in both:
            scheduler.picked(asked, decision)
        picked.add(tuple(decision.endpoints[0] for decision in both))
    assert len(picked) == 1


def test_of_a_sessions_name_only_so_much_is_kept_and_long_ones_differ() -> None:
    workers = [worker(0), worker(1)]
    rule = plugin("session-affinity-filter", strategy="session_id")
    scheduler = Scheduler({"p": Profile("p", (("s", rule),), (), picker())}, "p")
    for number, session in enumerate(("s" * 10_000 + "a", "s" * 10_000 + "b")):
        asked = ask(workers, headers={"x-session-id": session})
        only = scheduler.decide(asked, seen(workers[number : number + 1]), random.Random(0))
        scheduler.picked(asked, only)
        assert kept(rule, asked, workers) == [number]
    assert all(len(session) <= LONGEST_NAME for _, session in rule._bound)


def test_a_session_token_names_a_pod() -> None:
    workers = [worker(0), worker(1)]
    rule = plugin("session-affinity-filter")
    scorer = plugin("session-affinity-scorer")
    asked = ask(workers, headers={"x-session-token": token_of("ns/w-1")})
    assert kept(rule, asked, workers) == [1]
    assert scorer.scores(asked, seen(workers)) == [0.0, 1.0]
    scheduler = Scheduler({"p": Profile("p", (("s", rule),), (), picker())}, "p")
    decision = scheduler.decide(asked, seen(workers), random.Random(0))
    assert scheduler.answer_headers(decision) == (("x-session-token", token_of("w-1")),)
    for token in ("", "%%%", token_of("w-9")):
        assert kept(rule, ask(workers, headers={"x-session-token": token}), workers) == [0, 1]


# --- pickers


def picker(type_: str = "max-score-picker", **parameters: Any) -> Picker:
    found = plugin(type_, **parameters)
    assert isinstance(found, Picker)
    return found


def test_the_highest_score_wins_and_chance_decides_among_equals() -> None:
    found, rng = seen([worker(at) for at in range(3)]), random.Random(0)
    firsts = Counter(picker().order(found, [1.0, 2.0, 2.0], rng, 0)[0] for _ in range(1000))
    assert firsts[0] == 0
    assert firsts[1] == pytest.approx(500, abs=60)


def test_weighted_random_follows_the_scores() -> None:
    found, rng = seen([worker(at) for at in range(3)]), random.Random(0)
    choose = picker("weighted-random-picker")
    firsts = Counter(choose.order(found, [1.0, 3.0, 0.0], rng, 0)[0] for _ in range(4000))
    assert firsts[2] == 0
    assert firsts[1] == pytest.approx(3000, abs=120)
    evens = Counter(choose.order(found, [0.0, 0.0, 0.0], rng, 0)[0] for _ in range(3000))
    assert min(evens.values()) > 900


def test_round_robin_and_random() -> None:
    found, rng = seen([worker(at) for at in range(3)]), random.Random(0)
    turns = [picker("round-robin-picker").order(found, [0.0] * 3, rng, at)[0] for at in range(6)]
    assert turns == [0, 1, 2, 0, 1, 2]
    firsts = Counter(
        picker("random-picker").order(found, [9.0, 0.0, 0.0], rng, 0)[0] for _ in range(3000)
    )
    assert min(firsts.values()) > 900


@settings(max_examples=25)
@given(totals=st.lists(st.floats(0, 10), min_size=1, max_size=8), turn=st.integers(0, 100))
@pytest.mark.parametrize("type_", sorted(t for t in MADE if t.endswith("-picker")))
def test_every_order_is_a_permutation(type_: str, totals: list[float], turn: int) -> None:
    found = seen([worker(at) for at in range(len(totals))])
    order = picker(type_).order(found, totals, random.Random(turn), turn)
    assert sorted(order) == list(range(len(totals)))


# --- profiles


def test_a_decision_keeps_scores_weights_and_reasons() -> None:
    workers = [worker(0, app="a"), worker(1, app="a", told=(0, 4, 0)), worker(2)]
    profile = Profile(
        "default",
        (("mine", plugin("label-selector-filter", matchLabels={"app": "a"})),),
        (
            ("queue", 2.0, plugin("queue-scorer")),
            ("prefix", 3.0, plugin("prefix-cache-scorer")),
        ),
        picker(maxNumOfEndpoints=1),
    )
    decision = profile.decide(
        ask(workers), seen(workers, [0, 10]), ApproximatePrefixes(), random.Random(0)
    )
    assert decision.scorers == (("queue", 2.0), ("prefix", 3.0))
    assert [(s.candidate.name, s.scores, s.cost) for s in decision.ranked] == [
        ("w-1", (0.0, 1.0), -3.0),
        ("w-0", (1.0, 0.0), -2.0),
    ]
    assert [c.dropped for c in decision.dropped] == ["mine: label app is 'not there', not 'a'"]
    assert (decision.filtered, decision.limit, decision.how) == (1, 1, How.EXACT)
    assert decision.routing() == "exact;overlap=10/10;mode=profile"
    assert decision.terms(decision.ranked[0]) == {"queue": 0.0, "prefix": 3.0}


def test_a_decision_without_a_look_at_the_prompt_is_by_load() -> None:
    workers = [worker(0), worker(1)]
    profile = Profile("p", (), (("queue", 1.0, plugin("queue-scorer")),), picker())
    decision = profile.decide(ask(workers), seen(workers), ApproximatePrefixes(), random.Random(0))
    assert decision.how == How.LOAD_ONLY


def test_engines_without_events_are_known_by_what_was_sent_to_them() -> None:
    workers = [worker(at, tracked=False) for at in range(4)]
    profile = Profile("p", (), (("prefix", 1.0, plugin("prefix-cache-scorer")),), picker())
    scheduler = Scheduler({"p": profile}, "p")
    rng = random.Random(0)

    def pick(text: bytes) -> tuple[str, How, float]:
        asked = ask(workers, tokens=None, content=lambda: text)
        decision = scheduler.decide(asked, seen(workers), rng)
        scheduler.picked(asked, decision)
        return decision.endpoints[0], decision.how, decision.ranked[0].scores[0]

    first = pick(b"a" * 1024)
    assert (first[1], first[2]) == (How.APPROXIMATE, 0.0)
    assert pick(b"a" * 2048) == (first[0], How.APPROXIMATE, 0.5)
    assert pick(b"b" * 1024)[2] == 0.0


def test_a_restarted_or_full_engine_is_forgotten_in_order() -> None:
    index = ApproximatePrefixes(ApproximateParameters(auto_tune=False, lru_capacity_per_server=4))
    one, other = worker(0), worker(1)
    tokens = np.arange(256, dtype=np.uint32)
    first, second = index.keys("m", tokens), index.keys("m", tokens + 1000)
    index.record(one, first)
    index.record(other, first)
    assert index.match(first) == {one.hostport: 4, other.hostport: 4}
    index.record(one, second)
    assert index.match(first) == {other.hostport: 4}
    for number in range(2, 40):
        index.record(worker(number), first)
    index.keep({one.name: one})
    assert index.match(first) == {}
    assert index.match(second) == {one.hostport: 4}


def test_a_salt_and_a_model_have_prefixes_of_their_own() -> None:
    index = ApproximatePrefixes()
    index.record(worker(0), index.keys("m", b"x" * 1024))
    assert index.match(index.keys("m", b"x" * 1024))
    assert not index.match(index.keys("n", b"x" * 1024))
    assert not index.match(index.keys("m", b"x" * 1024, [b"salt"]))


def test_a_candidate_that_was_dropped_stays_so() -> None:
    workers = [worker(0), worker(1)]
    workers[0].endpoint = replace(workers[0].endpoint, ready=False)
    profile = Profile("p", (), (), picker())
    decision = profile.decide(ask(workers), seen(workers), ApproximatePrefixes(), random.Random(0))
    assert decision.endpoints == ("10.0.0.2:8000",)
    assert decision.filtered == 0
