"""Overload at three times the capacity: who is served, how soon, with and without flow control.

Two simulated engines of four slots get the same load twice: with the queue in the engines, as they
come, and with the queue in the picker. `python -m benchmarks.overload` writes
docs/benchmarks/overload.md.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.local_graph import component, graph, measure

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "benchmarks" / "overload.md"
WORKERS = 2
SLOTS = 4
PROFILE = {
    "prefill_tokens_per_s": 8000.0,
    "prefill_overhead_s": 0.01,
    "decode": [{"batch": 1, "step_s": 0.02}, {"batch": 64, "step_s": 0.02}],
}
MODES = {
    "in the engines": ["--no-flow-control"],
    "in the picker": ["--flow-control", "--queue-seconds=10", "--queue-requests=100"],
}


def run(arguments: list[str], folder: Path) -> dict[str, Any]:
    profile = folder / "profile.json"
    profile.write_text(json.dumps(PROFILE))
    identity = ["--tenant-header=x-tenant", "--priority-header=x-priority"]
    sim = [
        "--served-model-name=tiny",
        f"--max-num-seqs={SLOTS}",
        "--log-level=warning",
        f"--timing-profile={profile}",
    ]
    manifest = graph(
        "overload",
        component("Frontend", "frontend", [*identity, *arguments], 1),
        component("Worker", "worker", sim, WORKERS),
    )
    return measure(manifest, HERE / "load.py", str(arguments), folder)


def throughput_of(result: dict[str, Any]) -> float:
    """Served while the load lasted, over what the engines can serve."""
    served = sum(tenant["served_in_time"] for tenant in result["tenants"].values())
    return float(served / result["load_s"] / result["capacity"])


def rows(queue: str, result: dict[str, Any]) -> list[str]:
    tenants, alone = result["tenants"], result["alone_p50_s"]
    served = {name: tenant["served_in_time"] for name, tenant in tenants.items()}
    total = sum(served.values())
    lines = []
    for name, tenant in tenants.items():
        times = "–"
        if tenant["p50_s"] is not None:
            times = f"{tenant['p50_s'] / alone:.1f}× / {tenant['p99_s'] / alone:.1f}×"
        refused = {why: n for why, n in tenant["ended"].items() if why != "served"}
        why = ", ".join(f"{n} × {reason}" for reason, n in sorted(refused.items())) or "–"
        wait = "–"
        if tenant["retry_after"]:
            wait = "–".join(map(str, sorted(set(tenant["retry_after"])))) + " s"
        lines.append(
            f"| {queue} | {name} | {tenant['asked']} | {served[name] / total:.0%} | {times} "
            f"| {why} | {wait} |"
        )
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = {queue: run(args, Path(folder)) for queue, args in MODES.items()}
    theirs, ours = (result["answers"] for result in results.values())
    common = theirs.keys() & ours.keys()
    if not common or any(theirs[prompt] != ours[prompt] for prompt in common):
        sys.exit("the same prompt got different answers")
    for queue, result in results.items():
        if any(tenant["unexplained"] for tenant in result["tenants"].values()):
            sys.exit(f"{queue}: refusals without a reason or without Retry-After")
    throughput = ", ".join(
        f"{throughput_of(result):.2f}× with the queue {queue}" for queue, result in results.items()
    )
    lines = [
        "# Overload: three times the capacity",
        "",
        f"{WORKERS} simulated engines of {SLOTS} slots; {len(common)} prompts that were answered "
        "both times got the same answers. Tenants: urgent has priority 10, batch −1, flood and "
        "modest 0. Times are of whole answers, as multiples of their time without a queue. One "
        "run, 2 cores.",
        "",
        f"Throughput while the load lasted, of the capacity measured before: {throughput}.",
        "",
        "| queue | tenant | asked | share of what was served | time p50 / p99 | refused "
        "| Retry-After |",
        "|---|---|---|---|---|---|---|",
        *(row for queue, result in results.items() for row in rows(queue, result)),
        "",
        "With the queue in the engines nothing is refused but what may be shed, everybody waits "
        "behind everybody, longer with each second of overload. `python -m benchmarks.overload` "
        "writes this page.",
        "",
    ]
    PAGE.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
