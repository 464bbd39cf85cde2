"""`dynamo epp` against llm-d's picker behind the same Envoy: CPU of a request, and what it waits.

    LLM_D_EPP=/path/to/epp python -m benchmarks.epp.behind_gateway [--write PAGE] [--seconds 1.5]

Full duplex, 8 and 64 engines, prompts of three sizes, short and streamed answers, every byte
compared. Both pickers read the same configuration (llm-d's default scorers) and ask the same
engines for their metrics; ours is measured once more with exact tokens and the workers' streams.
Pickers take turns of a few seconds. CPU is what /proc says of a picker's process, divided by the
answers; what a request waits is its time with two connections less that of an Envoy without a
picker. LLM_D_EPP is built from llm-d/llm-d-router (`go build ./cmd/epp`); without it only ours and
the bare transport are measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_epp.frontend.bootstrap import Sockets
from dynamo_epp.frontend.envoy import Envoy
from dynamo_runtime.discovery import Endpoint, write_endpoints

from benchmarks.epp.processes import (
    LLM_D_PORT,
    SCORERS,
    connects,
    cpu_seconds,
    gateway,
    llm_d,
    ours,
    process,
)
from benchmarks.epp.traffic import SMALL, load

COUNTS = (8, 64)
SIZES = (SMALL, 32_000, 220_000)  # bytes of a request's body
PORT = 18000
CONNECTIONS, FEW = 32, 2
WARM_UP_S = 1.0
PICKERS = {
    "no picker": "direct",
    "bare grpc.aio": "floor",
    "ours, llm-d's scorers": "scorers",
    "ours, exact tokens": "exact",
    "llm-d's": "llm-d",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement."""

    engines: int
    size: int  # bytes
    stream: bool
    picker: str  # a value of ``PICKERS``


@dataclass(slots=True)
class Figures:
    answered: int
    cpu_ms: float  # of the picker, per answer
    times_ms: list[float]  # of answers, with few connections

    def quantile_ms(self, share: float) -> float:
        return statistics.quantiles(self.times_ms, n=100, method="inclusive")[
            round(share * 100) - 1
        ]


@contextlib.asynccontextmanager
async def picker(kind: str, number: int, hosts: list[str], work: Path) -> AsyncIterator[int]:
    """The picker ``kind`` at ``address(kind, number)``; its process id, 0 for none."""
    endpoints = work / f"{kind}.json"
    confirms = {"stream_port": 5557, "status_port": 9090} if kind != "scorers" else {}
    write_endpoints(
        endpoints,
        [Endpoint(name=f"engine-{h}", address=h, port=8000, ready=True, **confirms) for h in hosts],
    )
    log = work / f"{kind}.log"
    if kind == "direct":
        yield 0
    elif kind == "llm-d":
        async with llm_d(os.environ["LLM_D_EPP"], hosts, work) as pid:
            yield pid
    elif kind == "floor":
        argv = ours("pickers", kind, address(kind, number), str(endpoints))
        async with process(argv, log, until="ready") as pid:
            yield pid
    else:
        host, _, port = address(kind, number).rpartition(":")
        argv = [sys.executable, "-m", "dynamo_cli.main", "epp", "--host", host, "--grpc-port", port]
        argv += ["--endpoints-file", str(endpoints), "--no-secure-serving"]
        if kind == "scorers":
            argv += ["--config-text", SCORERS]
        async with process(argv, log, until="serving ext_proc") as pid:
            await connects(address(kind, number))
            yield pid


def address(kind: str, number: int) -> str:
    return f"127.0.0.1:{LLM_D_PORT}" if kind == "llm-d" else f"127.0.42.{number}:9002"


@contextlib.asynccontextmanager
async def envoy(kind: str, number: int, engine: str) -> AsyncIterator[None]:
    """An Envoy that asks the picker ``kind``."""
    with tempfile.TemporaryDirectory() as directory:
        sockets = Sockets(Path(directory))
        config = gateway((f"127.0.43.{number}", PORT), sockets, address(kind, number))
        if kind == "direct":
            config = json.dumps(without_picker(json.loads(config), engine))
        sockets.bootstrap.write_text(config)
        running = await Envoy.start(sockets, concurrency=1, log_level="error")
        try:
            async with asyncio.timeout(30):
                await running.live()
            yield
        finally:
            await running.stop()


def without_picker(config: dict[str, Any], engine: str) -> dict[str, Any]:
    """The same Envoy before a single engine."""
    static = config["static_resources"]
    (listener,) = static["listeners"]
    del listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0]
    _, pool = static["clusters"]
    static["clusters"] = [pool]
    del pool["lb_policy"], pool["original_dst_lb_config"]
    socket = {"socket_address": {"address": engine, "port_value": 8000}}
    pool["type"] = "STATIC"
    pool["load_assignment"] = {
        "cluster_name": "pool",
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket}}]}],
    }
    return config


async def measure(
    cell: Cell, number: int, pid: int, seconds: float, numbers: Iterator[int]
) -> Figures:
    async def sent(connections: int, length: float) -> list[float]:
        outcome = await load(
            f"127.0.43.{number}",
            PORT,
            stream=cell.stream,
            connections=connections,
            seconds=length,
            first=next(numbers),
            size=cell.size,
        )
        if outcome.wrong:
            wrong = f"{len(outcome.wrong)} of {outcome.answered} answers differ"
            raise SystemExit(f"{cell}: {wrong}: {outcome.wrong[0]}")
        return outcome.times

    await sent(CONNECTIONS, WARM_UP_S)
    before = cpu_seconds(pid) if pid else 0.0
    answered = len(await sent(CONNECTIONS, seconds))
    used = cpu_seconds(pid) - before if pid else 0.0
    times = await sent(FEW, seconds)
    return Figures(answered + len(times), used / answered * 1e3, [t * 1e3 for t in times])


async def main(seconds: float, write: Path | None) -> None:
    kinds = [kind for kind in PICKERS.values() if kind != "llm-d" or os.environ.get("LLM_D_EPP")]
    numbers = itertools.count(1, 1_000_000)
    results: dict[Cell, Figures] = {}
    for count in COUNTS:
        hosts = [f"127.0.41.{number}" for number in range(1, count + 1)]
        async with contextlib.AsyncExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            engines = process(ours("engines", *hosts), work / "engines.log", until="ready")
            await stack.enter_async_context(engines)
            pids = []
            for number, kind in enumerate(kinds, 1):
                pids.append(await stack.enter_async_context(picker(kind, number, hosts, work)))
                await stack.enter_async_context(envoy(kind, number, hosts[0]))
            for size, stream in itertools.product(SIZES, (False, True)):
                print(f"{count} engines, {size} bytes, stream={stream}", file=sys.stderr)
                for number, (kind, pid) in enumerate(zip(kinds, pids, strict=True), 1):
                    cell = Cell(count, size, stream, kind)
                    results[cell] = await measure(cell, number, pid, seconds, numbers)
    text = page(results, seconds)
    print(text)
    if write is not None:
        write.write_text(text)


def rows(results: dict[Cell, Figures]) -> Iterator[list[str]]:
    names = {kind: name for name, kind in PICKERS.items()}
    for cell, figures in results.items():
        if cell.picker == "direct":
            continue
        direct = results[Cell(cell.engines, cell.size, cell.stream, "direct")]
        llm_d = results.get(Cell(cell.engines, cell.size, cell.stream, "llm-d"))
        added = [figures.quantile_ms(q) - direct.quantile_ms(q) for q in (0.5, 0.99)]
        yield [
            str(cell.engines),
            f"{cell.size / 1000:g} KB",
            "100 chunks" if cell.stream else "short",
            names[cell.picker],
            f"{figures.cpu_ms:.2f}",
            f"{figures.cpu_ms / llm_d.cpu_ms:.2f}×" if llm_d else "–",
            *(f"{ms:.1f}" for ms in added),
        ]


def page(results: dict[Cell, Figures], seconds: float) -> str:
    heads = ("engines", "prompt", "answer", "picker", "CPU, ms", "of llm-d's")
    heads = (*heads, "added p50, ms", "added p99, ms")
    lines = [heads, ["---"] * len(heads), *rows(results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    answered = sum(figures.answered for figures in results.values())
    return f"""\
# Behind a gateway: `dynamo epp` and llm-d's picker

Written by `python -m benchmarks.epp.behind_gateway`.

{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; Envoy with one
thread, full duplex; {CONNECTIONS} connections for CPU, {FEW} for times, turns of {seconds:g} s. All
{answered} answers were compared byte for byte; none differed. Compare ratios within a block, not
milliseconds: load average {os.getloadavg()[1]:.0f} over the last five minutes, this run's own
included. Times with two connections have some hundred samples each, fewer where prompts are long.

{table}

- *Bare grpc.aio* answers with constants and relays; nobody could route with it.
- *llm-d's scorers*: queue, KV utilization and (estimated) prefix, the same configuration for both.
  llm-d's picker asks engines for metrics every 50 ms, ours every 250 ms.
- *Exact tokens*: chat template, tokens, block keys, the workers' caches and loads from their
  streams; no metrics are asked for.
- *Added* is the time to the last byte less that of the same Envoy without a picker.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="Markdown page to write")
    parser.add_argument("--seconds", type=float, default=1.5, help="of load for each figure")
    given = parser.parse_args()
    asyncio.run(main(given.seconds, given.write))
