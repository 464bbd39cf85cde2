"""Which rule holds for a model, and where its requests go."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from dynamo_epp.models import ModelRules, rules_from
from dynamo_epp.models.watch import follow_rules
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.kube_api import failure, serving

Json = dict[str, Any]
LLMD, OLD = "/apis/llm-d.ai/v1alpha2", "/apis/inference.networking.x-k8s.io/v1alpha2"


def rule(models: list[str], *targets: tuple[str, int | None]) -> Json:
    return {
        "matches": [{"model": {"type": "Exact", "value": model}} for model in models],
        "targets": [
            {"modelRewrite": model} | ({} if weight is None else {"weight": weight})
            for model, weight in targets
        ],
    }


def rewrite(name: str, *rules: Json, age: str = "2026-01-01T00:00:00Z", pool: str = "p") -> Json:
    return {
        "metadata": {"name": name, "namespace": "ns", "creationTimestamp": age},
        "spec": {"poolRef": {"name": pool}, "rules": list(rules)},
    }


def objective(title: str, priority: int | None, **reference: str) -> Json:
    spec: Json = {"poolRef": {"name": "p", **reference}}
    if priority is not None:
        spec["priority"] = priority
    return {"metadata": {"name": title, "namespace": "ns"}, "spec": spec}


def goes_to(rules: ModelRules, model: str) -> str | None:
    found = rules.rule(model)
    return None if found is None else found.draw(random.Random(1))


def test_precedence_is_exact_then_oldest_then_first() -> None:
    young = rewrite("a", rule(["m"], ("young", None)), rule([], ("young-any", None)))
    old = rewrite(
        "b",
        rule(["m", "n"], ("old", None)),
        rule(["m"], ("second", None)),
        rule([], ("old-any", None)),
        age="2025-01-01T00:00:00Z",
    )
    elsewhere = rewrite("c", rule(["m"], ("other", None)), age="2020-01-01T00:00:00Z", pool="q")
    rules = rules_from([], [young, old, elsewhere], "p")
    assert [goes_to(rules, model) for model in ("m", "n", "x")] == ["old", "old", "old-any"]
    assert goes_to(rules_from([], [young], "p"), "m") == "young"
    assert goes_to(rules_from([], [rewrite("a", rule(["m"], ("t", None)))], "p"), "x") is None


def test_weights_are_kept() -> None:
    rules = rules_from([], [rewrite("a", rule(["m"], ("a", 9), ("b", 1), ("none", None)))], "p")
    rng, found = random.Random(7), rules.rule("m")
    assert found is not None
    drawn = Counter(found.draw(rng) for _ in range(10_000))
    assert drawn.keys() == {"a", "b"}
    assert 850 < drawn["b"] < 1150
    alike = rules_from([], [rewrite("a", rule(["m"], ("a", None), ("b", None)))], "p").rule("m")
    assert alike is not None
    assert 4800 < Counter(alike.draw(rng) for _ in range(10_000))["a"] < 5200


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_always_a_target(weights: list[int], point: float) -> None:
    class Fixed:
        def random(self) -> float:
            return point

    targets = [(f"t{number}", weight) for number, weight in enumerate(weights)]
    found = rules_from([], [rewrite("a", rule([], *targets))], "p").rule("any")
    assert found is not None
    drawn = int(found.draw(Fixed()).removeprefix("t"))
    # Up to rounding, the point lies in the target's share of the line.
    at, slack = point * sum(weights), 1e-6
    assert sum(weights[:drawn]) - slack <= at <= sum(weights[: drawn + 1]) + slack


def test_a_rule_that_is_not_understood_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    bad = [rule(["x"]), {**rule([], ("t", 1)), "matches": [{"model": {"type": "Regex"}}]}]
    rules = rules_from([], [rewrite("a", *bad, rule(["m"], ("t", 1)))], "p")
    assert goes_to(rules, "m") == "t"
    assert goes_to(rules, "x") is None
    assert "InferenceModelRewrite a: spec.rules[0].targets names no model" in caplog.text
    assert "spec.rules[1].matches[0].model.type is 'Regex'; only Exact is known" in caplog.text


def test_a_pool_of_another_api_group_has_rules_of_its_own() -> None:
    old = "inference.networking.x-k8s.io"
    objectives = [objective("now", 1), objective("then", 2, group=old)]
    assert rules_from(objectives, [], "p").priorities == {"now": 1}
    assert rules_from(objectives, [], "p", old).priorities == {"then": 2}


def test_priorities_by_the_objective_that_a_request_names() -> None:
    rules = rules_from(
        [
            objective("high", 10),
            objective("high", 1),
            objective("batch", -5),
            objective("unset", None),
            objective("elsewhere", 3, name="q"),
            objective("no-pool", 3, kind="Service"),
        ],
        [],
        "p",
    )
    assert rules.priorities == {"high": 10, "batch": -5, "unset": 0}


async def test_what_there_is_at_the_beginning_is_told_before_it_counts_as_known() -> None:
    told: list[ModelRules] = []
    known = asyncio.Event()
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:

        async def old_group_not_served(request: Any) -> Any:
            return failure(404, "NotFound", "no such resource") if OLD in request.path else None

        api.interfere = old_group_not_served
        api.put(f"{LLMD}/inferencemodelrewrites", rewrite("a", rule(["m"], ("t", None))))
        following = asyncio.create_task(
            follow_rules(client, "ns", "p", told.append, rng=random.Random(1), on_known=known.set)
        )
        await asyncio.wait_for(known.wait(), 5)
        assert goes_to(told[-1], "m") == "t"
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_rules_follow_the_objects_of_both_groups() -> None:
    told: asyncio.Queue[ModelRules] = asyncio.Queue()
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:

        async def not_served(request: Any) -> Any:
            missing = OLD in request.path and not installed.is_set()
            return failure(404, "NotFound", "no such resource") if missing else None

        installed = asyncio.Event()
        api.interfere = not_served
        following = asyncio.create_task(
            follow_rules(
                client, "ns", "p", told.put_nowait, rng=random.Random(1), look_again_s=0.01
            )
        )
        api.put(f"{LLMD}/inferencemodelrewrites", rewrite("a", rule(["m"], ("t", None))))
        rules = await asyncio.wait_for(told.get(), 5)
        assert goes_to(rules, "m") == "t"
        api.put(f"{OLD}/inferenceobjectives", objective("high", 7))
        installed.set()
        rules = await asyncio.wait_for(told.get(), 5)
        assert (rules.priorities, goes_to(rules, "m")) == ({"high": 7}, "t")
        api.delete(f"{LLMD}/inferencemodelrewrites", "ns", "a")
        rules = await asyncio.wait_for(told.get(), 5)
        assert goes_to(rules, "m") is None
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
