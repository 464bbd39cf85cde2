"""Performance models: formulas on examples, what is learned, and which one is chosen."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from dynamo_planner.config import PlannerConfig
from dynamo_planner.config.model import Role, Roofline
from dynamo_planner.performance import (
    Point,
    ProfileModel,
    capacity,
    choose_model,
    load_profiles,
)
from dynamo_planner.performance.capacity import waited
from dynamo_planner.performance.live import Line, fit
from dynamo_planner.performance.model import RooflineModel
from dynamo_runtime.timing_profile import DEFAULT, DecodePoint, InvalidProfile, TimingProfile
from hypothesis import given
from hypothesis import strategies as st

CONFIG = PlannerConfig(mode="agg", optimization_target="sla", ttft_ms=400, itl_ms=20)
FLAT = TimingProfile(10_000, 0.0, (DecodePoint(1, 0.01), DecodePoint(101, 0.11)))


def of(role: Role, config: PlannerConfig = CONFIG, **lengths: float) -> object:
    given_lengths = {"isl": 1000.0, "osl": 100.0, "computed": 1000.0} | lengths
    return capacity(role, ProfileModel(FLAT), kv_tokens=None, config=config, **given_lengths)


def test_a_prefill_worker_waits_as_long_as_the_target_allows() -> None:
    # 0.1 s a prompt, 0.3 s of waiting allowed: ρ = 0.6 / 0.7.
    one = of("prefill")
    assert one.rps == pytest.approx(10 * 6 / 7)
    assert one.ttft_s == pytest.approx(0.4)


def test_a_decode_worker_takes_the_largest_batch_in_time() -> None:
    one = of("decode")  # 20 ms are the batch of 11
    assert (one.batch, one.itl_s) == (11, pytest.approx(0.02))
    assert one.rps == pytest.approx(11 / (100 * 0.02))


def test_the_cache_bounds_the_batch() -> None:
    model = ProfileModel(FLAT)
    lengths = {"isl": 1000.0, "osl": 100.0, "computed": 1000.0}
    one = capacity("decode", model, kv_tokens=3200, config=CONFIG, **lengths)
    assert one.batch == 3


def test_a_whole_worker_holds_both_and_takes_less() -> None:
    one = of("worker")
    assert one.ttft_s <= 0.4
    assert one.itl_s <= 0.02
    assert one.rps < min(of("prefill").rps, of("decode").rps)


def test_a_target_under_the_bare_time_is_said_and_does_not_ask_for_all_there_are() -> None:
    tight = CONFIG.model_copy(update={"ttft_ms": 50.0})
    one = of("prefill", tight)
    assert not one.reachable
    assert one.rps == pytest.approx(3.0)


@given(st.floats(0.05, 2), st.floats(0.05, 2))
def test_a_looser_target_never_takes_less(a: float, b: float) -> None:
    low, high = sorted((a, b))
    for role in ("prefill", "decode", "worker"):
        tight, loose = (
            CONFIG.model_copy(update={"ttft_ms": 1000 * t, "itl_ms": 100 * t}) for t in (low, high)
        )
        assert of(role, tight).rps <= of(role, loose).rps * (1 + 1e-9)


def test_the_wait_of_a_half_busy_queue_is_half_a_service() -> None:
    assert waited(1.0, 0.5) == pytest.approx(1.5)


def test_the_roofline_of_an_8b_model_on_an_h100() -> None:
    model = RooflineModel(
        Roofline(
            parameters=8.0,
            weight_bytes=16.0,
            kv_bytes_per_token=131_072,
            tflops=989.0,
            bandwidth_gb_s=3350.0,
        )
    )
    assert model.prefill_s(4000) == pytest.approx(0.129, rel=0.01)
    assert model.step_s(1, 1000) == pytest.approx(0.0069, rel=0.01)
    assert model.step_s(64, 2000) > 1.5 * model.step_s(1, 2000)
    assert (model.prefill_s(0), model.step_s(0, 1)) == (0, 0)


def test_a_line_is_found_and_never_falls() -> None:
    assert fit([(1, 3), (2, 5), (3, 7)]) == Line(1, 2)
    assert fit([(1, 3), (3, 1)]) == Line(2, 0)
    assert fit([(5, 10), (5, 10)]) == Line(0, 2)
    assert fit([]) is None


def points(model: TimingProfile) -> list[Point]:
    return [
        Point(float(n), 100.0 * n, model.prefill_seconds(100 * n), n, model.decode_step_seconds(n))
        for n in range(1, 20)
    ]


def test_what_is_measured_is_kept_as_long_as_it_holds() -> None:
    right = choose_model("worker", FLAT, points(FLAT), 500, CONFIG)
    assert right is not None
    assert (right.model.name, right.error) == ("profile", pytest.approx(0, abs=1e-9))
    wrong = choose_model("worker", DEFAULT, points(FLAT), 500, CONFIG)
    assert wrong is not None
    assert wrong.model.name == "live"
    assert "profile by" in str(wrong)


def test_nothing_to_reckon_with_is_no_model() -> None:
    assert choose_model("worker", None, points(FLAT)[:3], 500, CONFIG) is None
    assert choose_model("decode", None, points(FLAT), 500, CONFIG) is not None


def test_profiles_of_a_folder_are_for_one_role_or_for_both(tmp_path: Path) -> None:
    nothing = load_profiles(tmp_path)
    assert nothing.of("worker") is None
    assert "no profile" in nothing.note
    (tmp_path / "timing-profile.json").write_bytes(msgspec.json.encode(DEFAULT))
    (tmp_path / "prefill.json").write_bytes(msgspec.json.encode(FLAT))
    found = load_profiles(tmp_path)
    assert (found.of("prefill"), found.of("decode"), found.of("worker")) == (FLAT, DEFAULT, DEFAULT)
    assert load_profiles(tmp_path / "prefill.json").of("decode") == FLAT


def test_dynamos_files_are_refused_with_what_would_be_right(tmp_path: Path) -> None:
    (tmp_path / "raw_data.npz").write_bytes(b"")
    with pytest.raises(InvalidProfile, match=r"timing-profile\.json"):
        load_profiles(tmp_path)
