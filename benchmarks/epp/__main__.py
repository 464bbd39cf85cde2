"""CPU of the picker per request, ours against the bare transport and against llm-d's Go EPP.

    python -m benchmarks.epp [--write docs/benchmarks/epp.md] [--rounds 5] [--seconds 2]

Everything runs on this machine: eight small engines, pickers each with an Envoy of one thread, and
clients that compare every byte. The pickers take turns of a few seconds, so that what else the
machine does meets them alike. CPU is what /proc says a picker's process used during its turn,
divided by the answers. With LLM_D_EPP=/path/to/epp (built from llm-d/llm-d-router,
`go build ./cmd/epp`) llm-d's picker is measured in the same run; without it only ours are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

from dynamo_epp.frontend import FrontendSettings, bootstrap, write_eds
from dynamo_epp.frontend.bootstrap import Sockets, dump
from dynamo_epp.frontend.envoy import Envoy
from dynamo_runtime.discovery import Endpoint, write_endpoints
from rich.console import Console
from rich.table import Table

from benchmarks.epp.processes import LLM_D_PORT, cpu_seconds, gateway, llm_d, ours, process
from benchmarks.epp.traffic import Outcome, load

PORT = 18000
ENGINES = [f"127.0.41.{number}" for number in range(1, 9)]
CONNECTIONS = 32
WARM_UP_S = 1.5

_numbers = itertools.count(1, 1_000_000)


@dataclass(frozen=True)
class Subject:
    """One picker in one shape."""

    name: str
    kind: str  # of benchmarks.epp.pickers, or "llm-d"
    shape: str  # "frontend" or "gateway"
    host: str  # where its Envoy listens


@dataclass(frozen=True)
class Figures:
    answered: int
    rate: float  # answers a second
    picker_ms: float  # CPU per answer
    envoy_ms: float


@contextlib.asynccontextmanager
async def picker(subject: Subject, address: str, work: Path) -> AsyncIterator[int]:
    if subject.kind == "llm-d":
        async with llm_d(os.environ["LLM_D_EPP"], ENGINES, work) as pid:
            yield pid
        return
    argv = ours("pickers", subject.kind, address, str(work / "endpoints.json"))
    async with process(argv, work / f"{subject.kind}.log", until="ready") as pid:
        yield pid


def frontend(subject: Subject, sockets: Sockets) -> str:
    settings = FrontendSettings(http_host=subject.host, http_port=PORT, concurrency=1)
    config = bootstrap(settings, sockets)
    if subject.kind == "floor":  # it understands no access log
        (listener,) = config["static_resources"]["listeners"]
        del listener["filter_chains"][0]["filters"][0]["typed_config"]["access_log"]
    return dump(config)


@contextlib.asynccontextmanager
async def running(subject: Subject, work: Path) -> AsyncIterator[tuple[int, int]]:
    """The picker and an Envoy before it; their process ids."""
    with tempfile.TemporaryDirectory() as directory:
        sockets = Sockets(Path(directory))
        write_eds(sockets.eds, [Endpoint(name=host, address=host, port=8000) for host in ENGINES])
        if subject.shape == "frontend":
            address = f"unix:{sockets.picker}"
            sockets.bootstrap.write_text(frontend(subject, sockets))
        else:
            # llm-d's picker listens on every address: each other one has a port of its own.
            port = LLM_D_PORT + (0 if subject.kind == "llm-d" else int(subject.host[-1]) + 10)
            address = f"127.0.0.1:{port}"
            sockets.bootstrap.write_text(gateway((subject.host, PORT), sockets, address))
        async with picker(subject, address, work) as pid:
            envoy = await Envoy.start(sockets, concurrency=1, log_level="error")
            try:
                async with asyncio.timeout(30):
                    await envoy.live()
                yield pid, envoy.pid
            finally:
                await envoy.stop()


async def slice_of_load(
    subject: Subject, pids: tuple[int, int], stream: bool, seconds: float
) -> Figures:
    before = [cpu_seconds(pid) for pid in pids]
    outcome: Outcome = await load(
        subject.host,
        PORT,
        stream=stream,
        connections=CONNECTIONS,
        seconds=seconds,
        first=next(_numbers),
    )
    if outcome.wrong:
        raise SystemExit(
            f"{subject.name}, {subject.shape}: {len(outcome.wrong)} of {outcome.answered} answers "
            f"differ: {outcome.wrong[0]}"
        )
    picker_ms, envoy_ms = (
        (cpu_seconds(pid) - early) / outcome.answered * 1000
        for pid, early in zip(pids, before, strict=True)
    )
    return Figures(outcome.answered, outcome.answered / seconds, picker_ms, envoy_ms)


def merge(known: dict[bool, Figures], stream: bool, figures: Figures) -> None:
    """The best round counts: what else runs on the machine only ever adds."""
    before = known.get(stream)
    if before is None:
        known[stream] = figures
        return
    best = min(before, figures, key=lambda each: each.picker_ms)
    known[stream] = replace(best, answered=before.answered + figures.answered)


async def main(seconds: float, rounds: int, write: Path | None, only: str) -> None:
    kinds = [
        ("bare grpc.aio", "floor"),
        ("ours, constant picker", "protocol"),
        ("ours, everything on", "full"),
    ]
    named = [(*kind, shape) for shape in ("frontend", "gateway") for kind in kinds]
    if os.environ.get("LLM_D_EPP"):
        named.append(("llm-d's Go EPP", "llm-d", "gateway"))
    subjects = [
        Subject(*each, host=f"127.0.40.{number}")
        for number, each in enumerate(named, 1)
        if only in f"{each[2]} {each[1]}"
    ]
    results: dict[Subject, dict[bool, Figures]] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_endpoints(
            work / "endpoints.json",
            [
                Endpoint(
                    name=f"engine-{host}",
                    address=host,
                    port=8000,
                    ready=True,
                    stream_port=5557,
                    status_port=9090,
                )
                for host in ENGINES
            ],
        )
        async with (
            process(ours("engines", *ENGINES), work / "engines.log", until="ready"),
            contextlib.AsyncExitStack() as stack,
        ):
            pids = {s: await stack.enter_async_context(running(s, work)) for s in subjects}
            for subject in subjects:
                for stream in (False, True):
                    await slice_of_load(subject, pids[subject], stream, WARM_UP_S)
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", file=sys.stderr)
                for subject in subjects:
                    for stream in (False, True):
                        # Streamed answers are few: twice as long for figures as fine.
                        length = seconds * 2 if stream else seconds
                        figures = await slice_of_load(subject, pids[subject], stream, length)
                        merge(results.setdefault(subject, {}), stream, figures)
    rows = table(results)
    console = Console(width=110)
    shown = Table(*rows[0])
    for row in rows[1:]:
        shown.add_row(*row)
    console.print(shown)
    if write is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        write.write_text(page(rows, results, seconds, rounds))


def table(results: dict[Subject, dict[bool, Figures]]) -> list[list[str]]:
    """Ratios: to the bare transport in the same shape, and to llm-d's picker (always full duplex:
    it has no other shape)."""
    rows = [["answer", "shape", "picker", "answers/s", "picker CPU", "of floor", "of llm-d's"]]
    anchor = next((f for s, f in results.items() if s.kind == "llm-d"), None)
    for stream in (False, True):
        for subject, figures in results.items():
            mine = figures[stream]
            bare = next(
                (f for s, f in results.items() if s.kind == "floor" and s.shape == subject.shape),
                None,
            )
            rows.append(
                [
                    "100 chunks" if stream else "short",
                    {"frontend": "buffered, held", "gateway": "full duplex"}[subject.shape],
                    subject.name,
                    f"{mine.rate:.0f}",
                    f"{mine.picker_ms:.3f} ms",
                    f"{mine.picker_ms / bare[stream].picker_ms:.2f}×" if bare else "–",
                    f"{mine.picker_ms / anchor[stream].picker_ms:.2f}×" if anchor else "–",
                ]
            )
    return rows


def page(
    rows: list[list[str]],
    results: dict[Subject, dict[bool, Figures]],
    seconds: float,
    rounds: int,
) -> str:
    compared = sum(figures.answered for each in results.values() for figures in each.values())
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(
        [
            "# CPU of the endpoint picker per request",
            "",
            "Written by `python -m benchmarks.epp --write docs/benchmarks/epp.md`"
            + (" with `LLM_D_EPP` set." if os.environ.get("LLM_D_EPP") else "."),
            "",
            f"{platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}; Envoy with one thread, {CONNECTIONS} connections, "
            f"the best of {rounds} turns of {seconds:g} s (twice that for chunks), 8 engines, "
            "chats of some 600 bytes. "
            f"All {compared} answers were compared byte for byte; none differed. "
            "Compare ratios, not milliseconds: the load average was "
            f"{os.getloadavg()[1]:.0f} over the last five minutes, this run's own load included.",
            "",
            *lines,
            "",
            "- *Buffered, held* is the frontend's shape: the picker sees headers and body and none "
            "of the answer. *Full duplex* is the shape behind a foreign gateway: everything passes "
            "through the picker. llm-d's picker has only that one.",
            "- *Bare grpc.aio* answers with constants and relays; nobody could route with it. It "
            "is the price of the transport.",
            "- *Everything on*: request parsing, chat template and tokens, block keys, prefix "
            "index, load and bookings from the worker streams, journal, metrics, access log.",
            "- llm-d's picker runs its queue, KV-utilization and prefix scorers, scrapes the "
            "engines every 50 ms and hashes text; it does not tokenize.",
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="Markdown page to write")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load for each figure")
    parser.add_argument("--rounds", type=int, default=5, help="the best one counts")
    parser.add_argument("--only", default="", help="such as 'gateway', 'full', 'frontend floor'")
    given = parser.parse_args()
    asyncio.run(main(given.seconds, given.rounds, given.write, given.only))
