"""Block keys and prefix index against Dynamo 1.6.1's RadixTree, side by side in one run.

    python -m benchmarks.kv_index

Writes docs/benchmarks/kv_index.md.

Both sides get the same tokens; the match depths of all workers must be equal, or it fails. The
sides take turns, and each figure is the CPU time of its best turn.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dynamo_kv_router.index import BlockIndex
from dynamo_kv_router.keys import block_keys, model_seed
from dynamo_kv_router.stream.format import pack_keys, unpack_keys
from rich.console import Console
from rich.table import Table

from benchmarks.kv_index.workload import (
    BLOCK_SIZE,
    OTHER_PROMPTS_PER_WORKER,
    PROMPT_BLOCKS,
    WORKERS,
    Workload,
    make,
)

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements" / "bench-dynamo.txt"
PAGE = ROOT / "docs" / "benchmarks" / "kv_index.md"
ROUNDS = 15
REPEAT = 100


class Ours:
    def __init__(self, load: Workload) -> None:
        self.load = load
        self.seed = model_seed("benchmark")
        self.prompt = np.array(load.prompt, dtype=np.uint32)
        self.prompt_keys = self._keys(load.prompt)
        # Chains of 512 blocks, as on the other side.
        step = 512 * BLOCK_SIZE
        self.stored_keys = np.concatenate(
            [self._keys(load.stored[at : at + step]) for at in range(0, len(load.stored), step)]
        )
        others = [self._keys(tokens) for tokens in load.other]
        self.indexes: list[BlockIndex] = []
        for depths in load.depths:
            index = BlockIndex()
            for worker, depth in enumerate(depths):
                index.store(worker, self.prompt_keys[:depth])
            for number, keys in enumerate(others):
                index.store(number // OTHER_PROMPTS_PER_WORKER, keys)
            self.indexes.append(index)

    def _keys(self, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return block_keys(tokens, BLOCK_SIZE, seed=self.seed)

    def answer(self, case: int) -> list[list[int]]:
        return sorted([*item] for item in self.indexes[case].match(self.prompt_keys).items())

    def miss(self) -> list[list[int]]:
        return [[*item] for item in self.indexes[0].match(self.stored_keys[:512]).items()]

    def keys_from_array(self) -> float:
        return timed(lambda: block_keys(self.prompt, BLOCK_SIZE, seed=self.seed))

    def keys_from_list(self) -> float:
        return timed(lambda: self._keys(self.load.prompt))

    def match(self, case: int) -> float:
        return timed(lambda: self.indexes[case].match(self.prompt_keys))

    def match_unseen(self) -> float:
        """A prompt that was not asked for since its blocks were stored."""
        index, keys = self.indexes[0], self.prompt_keys
        spent = 0.0
        for _ in range(REPEAT):
            index.remove(0, keys)
            index.store(0, keys)
            start = time.process_time()
            index.match(keys)
            spent += time.process_time() - start
        return spent / REPEAT

    def store(self, event_blocks: int) -> float:
        """Seconds per block, from the bytes of `Stored` events of so many blocks."""
        keys = self.stored_keys
        events = [
            pack_keys(keys[at : at + event_blocks]) for at in range(0, len(keys), event_blocks)
        ]
        index = BlockIndex()
        gc.collect()
        start = time.process_time()
        for event in events:
            index.store(0, unpack_keys(event))
        return (time.process_time() - start) / len(keys)


def timed(call: Callable[[], object]) -> float:
    """Seconds per call."""
    start = time.process_time()
    for _ in range(REPEAT):
        call()
    return (time.process_time() - start) / REPEAT


class Anchor:
    """The other side, a process of its own venv."""

    def __init__(self, python: Path) -> None:
        self._process = subprocess.Popen(
            [python, Path(__file__).parent / "anchor.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def ask(self, *question: str | int) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the anchor process died with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def anchor_python() -> Path:
    """The anchor's venv, made on first use from pinned and hashed requirements."""
    cache = Path(os.environ.get("DYNAMO_CACHE") or Path.home() / ".cache" / "dynamo")
    venv = cache / "venvs" / "bench-dynamo"
    python = venv / "bin" / "python"
    done = venv / "requirements.txt"
    wanted = REQUIREMENTS.read_text()
    if done.exists() and done.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([python, *install, "--require-hashes", "-r", REQUIREMENTS], check=True)
    done.write_text(wanted)
    return python


Row = tuple[str, float, float, str, str]


def measure() -> list[Row]:
    """(what, ours s, theirs s, unit, goal); for stores seconds per block."""
    load = make()
    ours = Ours(load)
    anchor = Anchor(anchor_python())
    try:
        for case, depths in enumerate(load.depths):
            expected = [[worker, depth] for worker, depth in enumerate(depths)]
            if not ours.answer(case) == anchor.ask("answer", case) == expected:
                raise SystemExit("match depths differ from what was stored")
        if not ours.miss() == anchor.ask("miss") == []:
            raise SystemExit("a prompt that nobody holds matched")
        # What was built stays for the whole run; collecting it again and again is no one's cost.
        gc.freeze()
        cases: list[tuple[str, Callable[[], float], tuple[str | int, ...], str, str]] = [
            (f"keys, {PROMPT_BLOCKS * BLOCK_SIZE:,} tokens from a uint32 array",
             ours.keys_from_array, ("keys", REPEAT), "call", "≤ 0.25×"),
            (f"keys, {PROMPT_BLOCKS * BLOCK_SIZE:,} tokens from a list",
             ours.keys_from_list, ("keys", REPEAT), "call", "≤ 1×"),
            (f"match, {PROMPT_BLOCKS} blocks × {WORKERS} workers that hold all",
             lambda: ours.match(0), ("match", 0, REPEAT), "call", "≤ 0.6×"),
            ("… each holding another number of blocks",
             lambda: ours.match(1), ("match", 1, REPEAT), "call", "≤ 0.6×"),
            ("… holding all, first since every block lost and won a holder",
             ours.match_unseen, ("match", 0, REPEAT), "call", "published"),
            ("store, 512-block events", lambda: ours.store(512), ("store", 512), "block", "≤ 0.5×"),
            ("store, 32-block events", lambda: ours.store(32), ("store", 32), "block", "≤ 0.5×"),
            ("store, one by one", lambda: ours.store(1), ("store", 1), "block", "published"),
        ]  # fmt: skip
        rows: list[Row] = []
        for what, call, question, unit, goal in cases:
            mine, theirs = [], []
            for _ in range(ROUNDS):
                mine.append(call())
                theirs.append(anchor.ask(*question))
            rows.append((what, min(mine), min(theirs), unit, goal))
        return rows
    finally:
        anchor.close()


def figure(seconds: float, unit: str) -> str:
    if unit == "block":
        return f"{1e-6 / seconds:.2f} M blocks/s"
    return f"{seconds * 1e6:.0f} µs"


def markdown(rows: list[Row]) -> str:
    cores = os.cpu_count()
    lines = [
        "# Block keys and prefix index",
        "",
        "Written by `python -m benchmarks.kv_index`.",
        "",
        f"Against Dynamo 1.6.1 (RadixTree and block hashing, Rust through its Python binding; "
        f"PyPI `ai-dynamo-runtime`) on a {cores}-core machine. The sides take turns in one run, "
        f"each figure is the best of {ROUNDS} turns; ratios are of times, below 1 is faster than "
        "Dynamo. Match depths of all workers are compared before anything is measured.",
        "",
        "| what | ours | Dynamo 1.6.1 | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {what} | {figure(mine, unit)} | {figure(theirs, unit)} "
        f"| {mine / theirs:.2f}× | {goal} |"
        for what, mine, theirs, unit, goal in rows
    ]
    lines += [
        "",
        f"The index holds {WORKERS} workers with {OTHER_PROMPTS_PER_WORKER} other prompts of "
        f"{PROMPT_BLOCKS} blocks each. Figures are CPU time, since the machine has other work. "
        "The index keeps the masks of blocks in a cache that is filled on storing and on asking; "
        "in the third match row it helps with no block. Store takes events as they "
        "arrive: packed keys on our side, JSON on Dynamo's. Dynamo's binding takes tokens only as "
        "a list, so both key rows have the same anchor.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    rows = measure()
    table = Table("what", "ours", "Dynamo 1.6.1", "ratio", "goal")
    for what, mine, theirs, unit, goal in rows:
        table.add_row(what, figure(mine, unit), figure(theirs, unit), f"{mine / theirs:.2f}×", goal)
    Console().print(table)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(markdown(rows))


if __name__ == "__main__":
    main()
