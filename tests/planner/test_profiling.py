"""Measuring an engine: in virtual time against one whose times are known, and over real HTTP."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from dynamo_cli.main import app
from dynamo_planner.profiling import Answer, Plan, measure, profile_of
from dynamo_planner.profiling.measure import Measured, step_seconds
from dynamo_runtime.timing_profile import DecodePoint, TimingProfile, load
from typer.testing import CliRunner

from tests.virtual_time import in_virtual_time

TRUE = TimingProfile(8_000, 0.01, (DecodePoint(1, 0.010), DecodePoint(8, 0.017)))


class KnownEngine:
    """Computes one prompt after the other, then a token of each answer a step; ``most`` at once."""

    def __init__(self, most: int = 1000, tokens_a_chunk: int = 1) -> None:
        self.prompts: list[Sequence[int]] = []
        self._compute = asyncio.Lock()
        self._places = asyncio.Semaphore(most)
        self._running = 0
        self._each = tokens_a_chunk

    async def answer(self, prompt: Sequence[int], tokens: int) -> Answer:
        clock = asyncio.get_running_loop().time
        self.prompts.append(prompt)
        sent = clock()
        async with self._places:
            async with self._compute:
                await asyncio.sleep(TRUE.prefill_seconds(len(prompt)))
                self._running += 1
            arrived = [clock()]
            for _ in range((tokens - 1) // self._each):
                await asyncio.sleep(self._each * TRUE.decode_step_seconds(self._running))
                arrived.append(clock())
            self._running -= 1
        return Answer(sent, arrived, 1 + (tokens - 1) // self._each * self._each)


def measured(plan: Plan, **engine: int) -> tuple[list[Measured], KnownEngine]:
    points: list[Measured] = []
    engines: list[KnownEngine] = []

    async def main() -> None:
        engines.append(KnownEngine(**engine))
        points.extend([point async for point in measure(engines[0], plan)])

    in_virtual_time(main)
    return points, engines[0]


PLAN = Plan(prompts=(100, 400, 1600), batches=(1, 2, 4, 8), context=50, answer=80)


@pytest.mark.parametrize("tokens_a_chunk", [1, 2])
def test_the_profile_of_an_engine_is_found(tokens_a_chunk: int) -> None:
    points, engine = measured(PLAN, tokens_a_chunk=tokens_a_chunk)
    assert [(p.kind, p.size) for p in points] == [
        *(("prefill", n) for n in PLAN.prompts),
        *(("decode", n) for n in PLAN.batches),
    ]
    found = profile_of(
        [(p.size, p.seconds or 0) for p in points if p.kind == "prefill"],
        [(p.size, p.seconds or 0) for p in points if p.kind == "decode"],
    )
    assert found.prefill_tokens_per_s == pytest.approx(8_000, rel=0.01)
    assert found.prefill_overhead_s == pytest.approx(0.01, rel=0.01)
    for batch in PLAN.batches:
        true = TRUE.decode_step_seconds(batch)
        assert found.decode_step_seconds(batch) == pytest.approx(true, rel=0.03)
    assert len({tuple(prompt) for prompt in engine.prompts}) == len(engine.prompts)


def test_batches_end_where_the_engine_does_not_run_them_at_once() -> None:
    points, _ = measured(PLAN, most=3)
    assert [(p.size, p.seconds is None) for p in points if p.kind == "decode"] == [
        (1, False),
        (2, False),
        (4, True),
    ]
    assert points[-1].note == "the engine does not run 4 answers at once for long enough"


def test_steps_are_timed_while_all_answers_run() -> None:
    early = Answer(
        0.0, [1.0, *(1.0 + 0.5 * n for n in range(1, 5)), *(3 + 0.1 * n for n in range(1, 21))], 25
    )
    late = Answer(0.0, [3.0 + 0.1 * n for n in range(41)], 41)
    assert step_seconds([early, late]) == pytest.approx(0.1)
    assert step_seconds([early, Answer(0.0, [4.9, 5.1], 2)]) is None


def test_a_larger_batch_is_never_faster() -> None:
    found = profile_of([(100, 0.1), (200, 0.1)], [(4, 0.03), (1, 0.02), (2, 0.04)])
    assert [point.step_s for point in found.decode] == [0.02, 0.04, 0.04]
    assert found.prefill_seconds(5000) == pytest.approx(0.1, rel=0.01)


@contextmanager
def simulated_engine(*flags: str) -> Iterator[str]:
    command = [sys.executable, "-m", "dynamo_workers.sim", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(
        [*command, *flags], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"serving at 127\.0\.0\.1:(\d+)", line):
                    yield f"http://127.0.0.1:{found[1]}"
                    return
            pytest.fail("the engine did not start")
        finally:
            process.kill()


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["profile", *arguments])
    return result.exit_code, result.output


def test_the_command_measures_an_engine_and_writes_its_profile(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    with simulated_engine("--max-model-len", "1024", "--served-model-name", "tiny") as url:
        status, said = run(
            *("--url", url, "--out", str(out), "--prompts", "64,512,4096", "--batches", "1,4"),
            *("--context", "32", "--answer", "32"),
        )
        assert status == 0, said
        assert "left out: prompts of [4096] tokens" in said
        assert "512 tokens of prompt: " in said
        assert run("--url", url, "--model", "other")[1] == (
            f"dynamo profile: {url} serves tiny, not 'other'\n"
        )
    found = load(out)
    assert [point.batch for point in found.decode] == [1, 4]
    # How much slower a busy machine makes it is not judged; no engine is faster than its profile.
    assert found.decode[0].step_s > 0.009
    assert found.prefill_seconds(512) > 0.02


def test_what_can_not_be_measured_is_said(tmp_path: Path) -> None:
    status, said = run("--url", "http://127.0.0.1:1", "--out", str(tmp_path / "p"))
    assert status == 1
    assert said.startswith("dynamo profile: http://127.0.0.1:1: ")
    assert run("--url", "http://x", "--prompts", "a")[0] == 2
    assert run("--url", "http://x", "--out", str(tmp_path / "no" / "p"))[0] == 2
