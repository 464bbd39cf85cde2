"""Minutes of mixed load while workers are killed: what clients see, and what it costs the frontend.

Run by `dynamo up GRAPH --exec`. Every ``--kill-every`` seconds the engine or the launcher of a
random worker gets SIGKILL. Requests that ran on it may break; every other one has to be answered
whole. Writes a report in Markdown; exit status 0 if nothing else went wrong, no booking is left and
the frontend's memory has settled.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from dynamo_cli.local.record import PodRecord, UpRecord, running_ups
from mixed import Ask, Got, ask, bookings_left, send, text

BROKEN_AFTER_KILL_S = 3.0
"""An answer that breaks within this time of a kill is laid to it."""
GROWTH_LIMIT = 1.5
"""The frontend's memory at the end against the middle of the run."""


def me() -> UpRecord:
    """The run that started this script."""
    return next(up for up in running_ups() if up.url == os.environ["DYNAMO_URL"])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_one(rng: random.Random) -> str:
    """SIGKILL an engine or a launcher; what it was."""
    workers = [pod for pod in me().pods if pod.role == "worker" and pod.ready and pod.pid]
    if not workers:
        return "nobody was ready"
    pod: PodRecord = rng.choice(workers)
    assert pod.pid is not None
    victims = children(pod.pid) or [pod.pid]
    what, pid = rng.choice([("engine", victims[0]), ("launcher", pod.pid)])
    os.kill(pid, signal.SIGKILL)
    return f"{what} of {pod.name}"


def memory_mib(pid: int) -> float:
    """Resident memory of a process and its children."""
    total = 0
    for each in (pid, *children(pid)):
        pages = int(Path(f"/proc/{each}/statm").read_text().split()[1])
        total += pages * os.sysconf("SC_PAGESIZE")
    return total / 2**20


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(options.seed)
    url = os.environ["DYNAMO_URL"]
    frontend = next(pod for pod in me().pods if pod.role == "frontend")
    assert frontend.pid is not None
    conversations = [[{"role": "user", "content": text(rng, 60)}] for _ in range(100)]
    results: Counter[str] = Counter()
    surprises: list[str] = []
    kills: list[tuple[float, str]] = []
    memory: list[float] = []
    end = time.monotonic() + options.seconds
    number = 0

    def judge(one: Ask, got: Got | str) -> None:
        now = time.monotonic()
        near_kill = any(now - at < BROKEN_AFTER_KILL_S for at, _ in kills)
        if isinstance(got, Got) and got.status in (200, 400):
            results[str(got.status)] += 1
        elif got == "left":
            results["client left"] += 1
        elif near_kill:
            results["broken by a kill"] += 1
        else:
            results["unexplained"] += 1
            surprises.append(f"{one.name}: {got}")

    async def client(seed: int, session: aiohttp.ClientSession) -> None:
        nonlocal number
        mine = random.Random(seed)
        while time.monotonic() < end:
            number += 1
            one = ask(number, mine, conversations)
            judge(one, await send(session, url, one, mine))

    async def killer() -> None:
        while time.monotonic() < end - 15:
            await asyncio.sleep(options.kill_every)
            kills.append((time.monotonic(), kill_one(rng)))

    async def watcher() -> None:
        while time.monotonic() < end:
            memory.append(memory_mib(frontend.pid or 0))
            await asyncio.sleep(2)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        clients = [client(seed, session) for seed in range(options.concurrency)]
        await asyncio.gather(killer(), watcher(), *clients)
        status = url.rsplit(":", 1)[0] + ":9090"
        left = await bookings_left(session, status)
        for _ in range(100):
            if left == 0:
                break
            await asyncio.sleep(0.1)
            left = await bookings_left(session, status)
    half = len(memory) // 2
    return {
        "seconds": options.seconds,
        "requests": number,
        "results": dict(results),
        "kills": [what for _, what in kills],
        "surprises": surprises[:20],
        "bookings_left": left,
        "memory_mib": {
            "start": memory[0],
            "middle": memory[half],
            "end": memory[-1],
        },
    }


def report(found: dict[str, Any]) -> str:
    memory = found["memory_mib"]
    lines = [
        f"# Soak, {time.strftime('%Y-%m-%d')}",
        "",
        f"{found['requests']} mixed requests in {found['seconds']:g} s through one frontend to "
        f"simulated workers, {len(found['kills'])} of which got SIGKILL meanwhile.",
        "",
        "| outcome | requests |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(found["results"].items())),
        "",
        f"Broken by a kill: broke within {BROKEN_AFTER_KILL_S:g} s of one; on which worker it ran "
        "was not looked up.",
        "",
        f"Killed: {', '.join(found['kills']) or 'nothing'}.",
        "",
        f"Bookings left behind: {found['bookings_left']:g}. Resident memory of the frontend with "
        f"Envoy, against its start: {memory['middle'] / memory['start']:.2f}× in the middle, "
        f"{memory['end'] / memory['start']:.2f}× at the end.",
        "",
    ]
    if found["surprises"]:
        lines += ["Unexplained:", "", *(f"- {line}" for line in found["surprises"]), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--kill-every", type=float, default=20)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    found = asyncio.run(soak(options))
    print(json.dumps(found))
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(report(found))
    memory = found["memory_mib"]
    settled = memory["end"] <= memory["middle"] * GROWTH_LIMIT
    return 0 if not (found["surprises"] or found["bookings_left"]) and settled else 1


if __name__ == "__main__":
    sys.exit(main())
