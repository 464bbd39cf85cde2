"""Tokenizing each turn of a conversation: through the segment cache against in full.

    python -m benchmarks.tokenize

Both sides use the same tokenizer in one process and take turns; the token ids of every turn must be
equal, or it fails. Each round has a conversation of its own and passes over it several times, each
time from an empty cache; the best pass counts, since neighbours on the machine only ever add.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from dynamo_epp.tokenize import Tokenizer, Tokens
from dynamo_workers.tiny import TOKENIZER_FILES, TOKENIZER_FOLDER
from rich.console import Console
from rich.table import Table

from benchmarks.tokenize.chats import TURNS, turns
from benchmarks.tokenize.packages import MODEL_TYPES, PackageMissing, fetch

ROUNDS = 15
PASSES = 5
GOAL = 0.15
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "tokenize.md"

T = TypeVar("T")


@dataclass
class Times:
    """Seconds by turn, one figure a round."""

    full: list[list[float]] = field(default_factory=lambda: [[] for _ in range(TURNS)])
    cached: list[list[float]] = field(default_factory=lambda: [[] for _ in range(TURNS)])
    rendered: list[list[float]] = field(default_factory=lambda: [[] for _ in range(TURNS)])
    tokens: list[int] = field(default_factory=lambda: [0] * TURNS)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Result and CPU seconds: both sides run in the calling thread, so others' work is left out."""
    start = time.thread_time()
    result = call()
    return result, time.thread_time() - start


def measure(files: dict[str, bytes]) -> Times:
    ours = Tokenizer.from_files(files, {})
    whole = Tokenizer.from_files(files, {})
    whole.disable_segments()
    times = Times()
    for round_ in range(ROUNDS):
        prompts = turns(round_ + 1000)
        best = [[float("inf")] * TURNS for _ in range(3)]
        for _ in range(PASSES):
            ours.forget_segments()
            texts = []
            for turn, prompt in enumerate(prompts):
                text, seconds = timed(partial(ours.render, prompt))
                texts.append(text)
                best[2][turn] = min(best[2][turn], seconds)
            results: list[list[Tokens]] = []
            for side, tokenizer in enumerate((whole, ours)):
                results.append([])
                for turn, text in enumerate(texts):
                    tokens, seconds = timed(partial(tokenizer.encode_text, text, False))
                    results[side].append(tokens)
                    best[side][turn] = min(best[side][turn], seconds)
            for turn, (full, cached) in enumerate(zip(*results, strict=True)):
                if not np.array_equal(full, cached):
                    raise SystemExit(f"turn {turn}: tokens differ")
                times.tokens[turn] = len(full)
        for turn in range(TURNS):
            times.full[turn].append(best[0][turn])
            times.cached[turn].append(best[1][turn])
            times.rendered[turn].append(best[2][turn])
    return times


def tokenizers() -> dict[str, dict[str, bytes]]:
    found = {"bundled": {name: (TOKENIZER_FOLDER / name).read_bytes() for name in TOKENIZER_FILES}}
    for package in MODEL_TYPES:
        try:
            found[package] = fetch(package) | {"config.json": MODEL_TYPES[package]}
        except PackageMissing as missing:
            print(f"left out: {missing}")
    return found


Row = tuple[str, str, int, float, float, float, float]


def rows(name: str, times: Times) -> list[Row]:
    """The first, a middle and the last turn, and the mean of the turns that have a history."""
    median = statistics.median

    def row(label: str, chosen: list[int]) -> Row:
        full, cached, rendered = (
            statistics.mean(median(side[turn]) for turn in chosen)
            for side in (times.full, times.cached, times.rendered)
        )
        tokens = round(statistics.mean(times.tokens[turn] for turn in chosen))
        return name, label, tokens, full, cached, cached / full, rendered

    return [
        row("1 (nothing cached)", [0]),
        row("2", [1]),
        row("5", [4]),
        row("10", [9]),
        row("mean of 2–10", list(range(1, TURNS))),
    ]


def markdown(table: list[Row]) -> str:
    lines = [
        "# Tokenizing the turns of a conversation",
        "",
        "Written by `python -m benchmarks.tokenize`.",
        "",
        f"Ten turns, about 2,000 tokens at the end, on {os.cpu_count()} shared cores. Both sides "
        "tokenize the same rendered text with the same tokenizer and take turns, a conversation "
        f"each; ids are compared in every turn. CPU time; medians of {ROUNDS} conversations, each "
        f"the best of {PASSES} passes that start with an empty cache. "
        f"Goal at about 2,000 tokens: {GOAL}× of full tokenization. The last column is the chat "
        "template alone, which both need.",
        "",
        "| tokenizer | turn | tokens | in full | segment cache | ratio | template |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {turn} | {tokens} | {full * 1e3:.2f} ms | {cached * 1e3:.2f} ms | "
        f"{ratio:.2f}× | {rendered * 1e3:.2f} ms |"
        for name, turn, tokens, full, cached, ratio, rendered in table
    ]
    lines += [
        "",
        "A turn costs what is new in it: question and previous answer, here a tenth of the text at "
        "the end. Cutting the text and putting the kept tokens together is what comes on top.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    table = [row for name, files in tokenizers().items() for row in rows(name, measure(files))]
    shown = Table("tokenizer", "turn", "tokens", "in full", "segment cache", "ratio", "template")
    for name, turn, tokens, full, cached, ratio, rendered in table:
        figures = (f"{full * 1e3:.2f} ms", f"{cached * 1e3:.2f} ms", f"{ratio:.2f}×")
        shown.add_row(name, turn, str(tokens), *figures, f"{rendered * 1e3:.2f} ms")
    Console().print(shown)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(markdown(table))


if __name__ == "__main__":
    main()
