"""The timing profile: interpolation, and errors that name the field."""

from pathlib import Path

import pytest
from dynamo_runtime.timing_profile import (
    DEFAULT,
    DecodePoint,
    InvalidProfile,
    TimingProfile,
    load,
)
from hypothesis import given
from hypothesis import strategies as st


def test_linear_between_and_beyond_the_points() -> None:
    profile = TimingProfile(
        prefill_tokens_per_s=1000,
        prefill_overhead_s=0.5,
        decode=(DecodePoint(1, 0.01), DecodePoint(11, 0.03)),
    )
    assert profile.prefill_seconds(0) == 0
    assert profile.prefill_seconds(1000) == 1.5
    assert [round(profile.decode_step_seconds(n), 6) for n in (0, 1, 6, 11, 16)] == [
        0,
        0.01,
        0.02,
        0.03,
        0.04,
    ]


@given(st.integers(1, 2000), st.integers(0, 2000))
def test_a_larger_batch_never_takes_less(batch: int, more: int) -> None:
    assert DEFAULT.decode_step_seconds(batch + more) >= DEFAULT.decode_step_seconds(batch)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '{"prefill_tokens_per_s": 0}', "prefill_tokens_per_s must be greater than 0"),
        ("p.json", '{"prefil": 1}', "unknown field `prefil`"),
        ("p.yaml", "decode: []", "decode needs at least one point"),
        ("p.json", '{"decode": [{"batch": 2, "step_s": 1}, {"batch": 1, "step_s": 1}]}', "rise"),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidProfile, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidProfile, match="No such file"):
        load(tmp_path / "none.json")
