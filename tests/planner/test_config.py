"""Configurations: Dynamo's keys, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dynamo_crds.problem import InvalidManifest
from dynamo_planner.config import PlannerConfig, given_config

DYNAMOS = (  # of Dynamo's example vllm/deploy/disagg_planner.yaml
    '{"environment": "kubernetes", "backend": "vllm", "optimization_target": "sla", '
    '"enable_throughput_scaling": true, "enable_load_scaling": true, '
    '"pre_deployment_sweeping_mode": "none", "throughput_adjustment_interval_seconds": 60, '
    '"load_adjustment_interval_seconds": 5}'
)


def wrong(text: str) -> str:
    with pytest.raises(InvalidManifest) as caught:
        given_config(text)
    return str(caught.value)


def test_dynamos_example_is_taken_and_what_has_no_effect_is_said() -> None:
    given = given_config(DYNAMOS)
    assert given.config.predictive
    assert given.config.reactive
    assert given.config.throughput_adjustment_interval_seconds == 60
    assert [note.split(":")[0] for note in given.notes] == [
        "pre_deployment_sweeping_mode has no effect"
    ]


def test_nothing_given_is_all_defaults_and_they_are_dynamos() -> None:
    config = given_config("").config
    assert config == PlannerConfig()
    assert (config.mode, config.optimization_target, config.max_gpu_budget) == (
        "disagg",
        "throughput",
        8,
    )
    assert (config.ttft_ms, config.itl_ms, config.min_endpoint) == (500, 50, 1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "mode: agg\nttft: 200\noptimization_target: sla\n"),
        ("c.json", '{"mode": "agg", "ttft_ms": 200, "optimization_target": "sla"}'),
    ],
)
def test_files_and_older_names(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    given = given_config(str(file))
    assert (given.config.mode, given.config.ttft_ms, given.notes) == ("agg", 200, ())
    assert given_config(text) == given


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"--config no/such\.yaml: No such file"):
        given_config("no/such.yaml")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"max_gpu_budgets": 4}, "max_gpu_budget (nearest known field)"),
        ({"mode": "aggregated"}, "agg"),
        ({"min_endpoint": 0}, "can't be scaled to zero"),
        ({"ttft": 1, "ttft_ms": 1}, "the same key under two names"),
        ({"environment": "global-planner"}, "there is no global planner"),
        ({"backend": "sglang"}, "only the metrics of vLLM"),
        ({"enable_power_awareness": True}, "power is not watched"),
        ({"scheduling": {"external_plugins": [{}]}}, "no plugins are called"),
        ({"optimization_target": "load"}, "prefill_scale_up_queue_tokens"),
        ({"optimization_target": "load", "mode": "agg"}, "decode_scale_up_kv_rate"),
        ({"min_endpoint": 3, "max_endpoint": 2}, "at most max_endpoint (2)"),
        ({"prefill_max_endpoint": 2, "min_endpoint": 3}, "at most prefill_max_endpoint (2)"),
        ({"min_gpu_budget": 9}, "at most max_gpu_budget (8)"),
        ({"load_adjustment_interval_seconds": 180}, "the reactive loop must be the faster one"),
        ({"optimization_target": "sla", "enable_throughput_scaling": False}, "both loops off"),
        ({"components": {"A": {"costs": 1}}}, "components.A.costs"),
        ({"ttft_ms": "fast"}, "a number"),
    ],
)
def test_mistakes_name_the_key_and_what_would_be_right(config: object, told: str) -> None:
    assert told in wrong(json.dumps(config))


def test_every_mistake_is_told_at_once() -> None:
    told = wrong('{"mode": "x", "itl_ms": -1, "nonsense": 1}')
    assert [line for line in ("mode", "itl_ms", "nonsense") if line in told] == [
        "mode",
        "itl_ms",
        "nonsense",
    ]


def test_keys_that_do_nothing_in_this_combination_are_named() -> None:
    notes = given_config('{"ttft_ms": 100, "load_predictor": "prophet"}').notes
    assert any("optimization_target is throughput" in note for note in notes)
    assert any("holt-winters" in note for note in notes)


def test_bounds_of_a_role_are_its_own_or_those_of_all() -> None:
    config = given_config('{"min_endpoint": 2, "prefill_min_endpoint": 1, "max_endpoint": 5}')
    assert [config.config.fewest(role) for role in config.config.roles] == [1, 2]
    assert [config.config.most(role) for role in config.config.roles] == [5, 5]
