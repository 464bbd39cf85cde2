"""Decisions on a terminal. Names in them come from clients: no markup of theirs is obeyed, and no
control character reaches the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dynamo_cli.explain.words import sentences

Json = dict[str, Any]

COLUMNS = ("time", "request", "model", "how", "overlap", "tokens", "worker", "status")


def plain(text: object) -> str:
    """``text`` on one line, with control characters as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _console() -> Console:
    """Wide where nobody's terminal limits it, so that pipes and logs get whole columns."""
    width = None if sys.stdout.isatty() else 240
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _outcome(decision: Json) -> str:
    outcome = decision["outcome"]
    status = outcome.get("status")
    if status is None:
        return "running"
    # A stream that broke off began with 200.
    more = outcome.get("flags") or outcome.get("dropped_reason")
    return f"{status} {more}" if more else str(status)


def _worker(decision: Json) -> str:
    """The pick, and who answered if that was another."""
    name = decision.get("worker") or "(none)"
    served_by = decision["outcome"].get("served_by")
    return f"{name} → {served_by}" if served_by else name


def cells(decision: Json) -> tuple[str, ...]:
    """One decision in the order of ``COLUMNS``."""
    tokens, blocks = decision["prompt_tokens"], decision["blocks"]
    return (
        time.strftime("%H:%M:%S", time.localtime(decision["time"])),
        plain(decision["request_id"]),
        plain(decision["model"]) or "-",
        decision["how"],
        f"{decision['overlap_blocks']}/{blocks}" if blocks else "-",
        str(tokens) if tokens >= 0 else "-",
        plain(_worker(decision)),
        plain(_outcome(decision)),
    )


def table(decisions: Sequence[Json]) -> None:
    console = _console()
    if not decisions:
        console.print("No decisions yet.")
        return
    several = any("picker" in decision for decision in decisions)
    shown = Table(box=None, header_style="bold")
    for name in (*COLUMNS, "picker")[: None if several else -1]:
        shown.add_column(name, no_wrap=name not in ("worker", "status"))
    for decision in decisions:
        picker = (plain(decision.get("picker", "")),) if several else ()
        shown.add_row(*cells(decision), *picker)
    console.print(shown)


def line(decision: Json) -> str:
    """One decision for a list that grows."""
    told = "  ".join(cells(decision))
    if reason := decision["reason"]:
        told += f"  ({plain(reason)})"
    return told


def one(decision: Json) -> None:
    """Everything about one decision: sentences first, then every candidate."""
    console = _console()
    by = f"  by {decision['picker']}" if "picker" in decision else ""
    head = f"request {decision['request_id']}  {decision['path']}  {decision['model']}{by}"
    console.print(plain(head), style="bold")
    for sentence in sentences(decision):
        console.print(plain(sentence))
    stages = ", ".join(f"{name} {ms:.2f} ms" for name, ms in decision["stages_ms"].items())
    if stages:
        console.print(f"The pick took: {stages}.")
    if decision["candidates"]:
        console.print()
        console.print(_candidates(decision["candidates"]))
    if prefill := (decision.get("disagg") or {}).get("candidates"):
        console.print("\nFor the prefill:")
        console.print(_candidates(prefill))


def _candidates(candidates: Sequence[Json]) -> Table:
    shown = Table(box=None, header_style="bold")
    for name in ("", "worker", "endpoint", "overlap", "cost", "terms", "requests", "why"):
        shown.add_column(name)
    for rank, candidate in enumerate(candidates):
        terms = " + ".join(f"{name} {value:.4g}" for name, value in candidate["terms"].items())
        cost = candidate["cost"] if candidate["cost"] is not None else candidate.get("score")
        chosen = rank == 0 and not candidate["dropped"]
        dropped = f"dropped: {candidate['dropped']}" if candidate["dropped"] else ""
        shown.add_row(
            "→" if chosen else "",
            plain(candidate["name"]),
            candidate["endpoint"],
            str(candidate["overlap_blocks"]),
            "-" if cost is None else f"{cost:.4g}",
            terms,
            f"{candidate['active_requests']:g}",
            plain(dropped or candidate.get("why") or ("" if chosen else "ranked lower")),
        )
    return shown
