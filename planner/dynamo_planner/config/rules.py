"""What must hold between several keys. Wrong types are told elsewhere and are passed over here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dynamo_crds.schema import Rule, Violation

QUEUE = ("prefill_scale_down_queue_tokens", "prefill_scale_up_queue_tokens")
KV_RATE = ("decode_scale_down_kv_rate", "decode_scale_up_kv_rate")
Check = Callable[[Mapping[str, Any]], Iterator[Violation]]


def _rule(message: str, check: Check) -> Rule:
    def checked(data: Any) -> Iterator[Violation]:
        if isinstance(data, dict):
            yield from check(data)

    return Rule(message, check=checked)


def _number(data: Mapping[str, Any], key: str, otherwise: float | None = None) -> float | None:
    value = data.get(key, otherwise)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _needed(data: Mapping[str, Any]) -> Iterator[Violation]:
    if data.get("optimization_target") != "load":
        return
    mode = data.get("mode", "disagg")
    if mode in ("disagg", "prefill"):
        for key in QUEUE:
            if key not in data:
                yield Violation((key,), None, "a number of tokens queued at one worker")
    if mode in ("disagg", "decode", "agg"):
        for key in KV_RATE:
            if key not in data:
                yield Violation((key,), None, "a percentage of the KV cache, 0 to 100")


def _apart(data: Mapping[str, Any]) -> Iterator[Violation]:
    for low, high in (QUEUE, KV_RATE):
        least, most = _number(data, low), _number(data, high)
        if least is not None and most is not None and least >= most:
            yield Violation((low,), least, f"less than {high} ({most:g})")


def _not_above(data: Mapping[str, Any]) -> Iterator[Violation]:
    bounds = [
        ("min_endpoint", 1, "max_endpoint"),
        ("prefill_min_endpoint", data.get("min_endpoint", 1), "prefill_max_endpoint"),
        ("decode_min_endpoint", data.get("min_endpoint", 1), "decode_max_endpoint"),
        ("min_prefill_decode_ratio", None, "max_prefill_decode_ratio"),
    ]
    budget = _number(data, "max_gpu_budget", 8)
    for low, otherwise, high in bounds:
        least, most = _number(data, low, otherwise), _number(data, high)
        if least is not None and most is not None and least > most:
            yield Violation((low,), least, f"at most {high} ({most:g})")
    least = _number(data, "min_gpu_budget", -1)
    if least is not None and budget is not None and 0 <= budget < least:
        yield Violation(("min_gpu_budget",), least, f"at most max_gpu_budget ({budget:g})")


def _some_loop(data: Mapping[str, Any]) -> Iterator[Violation]:
    if (
        data.get("optimization_target") == "sla"
        and data.get("enable_throughput_scaling") is False
        and not data.get("enable_load_scaling")
    ):
        expected = "enable_throughput_scaling or enable_load_scaling"
        yield Violation(("enable_throughput_scaling",), False, expected)


def _faster(data: Mapping[str, Any]) -> Iterator[Violation]:
    fast = _number(data, "load_adjustment_interval_seconds", 5)
    slow = _number(data, "throughput_adjustment_interval_seconds", 180)
    if fast is not None and slow is not None and fast >= slow:
        expected = f"less than throughput_adjustment_interval_seconds ({slow:g})"
        yield Violation(("load_adjustment_interval_seconds",), fast, expected)


RULES = (
    _rule("target load needs it in this mode", _needed),
    _rule("between the two thresholds nothing is scaled, so they must be apart", _apart),
    _rule("more than the most that is allowed", _not_above),
    _rule("with both loops off nothing would ever be scaled", _some_loop),
    _rule("the reactive loop must be the faster one", _faster),
)
