"""Recordings and `dynamo planner replay`."""

from __future__ import annotations

from pathlib import Path

import pytest
from dynamo_cli.main import app
from dynamo_planner.config import PlannerConfig
from dynamo_planner.record import InvalidRecording, replay
from typer.testing import CliRunner

from tests.planner.simulated_fleet import Loop


@pytest.fixture(scope="module")
def recording() -> bytes:
    config = PlannerConfig(mode="agg", max_gpu_budget=4)
    loop = Loop(config, lambda now: 40.0 if now > 60 else 0.0)
    loop.run(120)
    return b"".join(loop.recording)


def run(file: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["planner", "replay", *options, str(file)])
    return result.exit_code, result.output


def test_what_moved_is_shown_with_its_reason(recording: bytes, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(recording)
    status, said = run(file)
    assert status == 0
    assert "worker  1 → 4  KV cache use is" in said
    assert said.endswith("24 looks, all as recorded\n")
    assert len(run(file, "--every")[1].splitlines()) == 25


def test_another_decision_is_an_error_and_shown(recording: bytes, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(recording.replace(b'"max_gpu_budget":4', b'"max_gpu_budget":3'))
    status, said = run(file)
    assert status == 1
    assert "1 → 3" in said
    assert "not as recorded" in said


def test_the_torn_line_of_a_killed_planner_is_left_out(recording: bytes) -> None:
    lines = recording.splitlines(keepends=True)
    assert len(list(replay([*lines[:-1], lines[-1][:-20]]))) == len(lines) - 2


def test_what_is_no_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecording, match="r, line 1"):
        list(replay([b"{}\n"], "r"))
    with pytest.raises(InvalidRecording, match="the file is empty"):
        list(replay([], "r"))
    file = tmp_path / "missing"
    assert run(file) == (2, f"dynamo planner replay: {file}: No such file or directory\n")
