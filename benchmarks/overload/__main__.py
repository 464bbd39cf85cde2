"""Overload at three times the capacity: who is served, how soon, with and without flow control.

Two simulated engines of four slots get the same load twice: with the queue in the engines, as they
come, and with the queue in the picker. `python -m benchmarks.overload` writes
docs/benchmarks/overload.md.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.overload.scenario import SLOTS, WORKERS, of_fair_share, run, throughput

PAGE = Path(__file__).parent.parent.parent / "docs" / "benchmarks" / "overload.md"
MODES = {
    "in the engines": ["--no-flow-control"],
    "in the picker": ["--flow-control", "--queue-seconds=10", "--queue-requests=100"],
}


def rows(queue: str, result: dict[str, Any]) -> list[str]:
    tenants, alone = result["tenants"], result["alone"]["p50_s"]
    served = {name: tenant["served_settled"] for name, tenant in tenants.items()}
    total, fair = sum(served.values()), of_fair_share(result)
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
        share = f"{fair[name]:.2f}×" if name in fair else "–"
        lines.append(
            f"| {queue} | {name} | {tenant['asked']} | {served[name] / total:.0%} | {share} "
            f"| {times} | {why} | {wait} |"
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
        for tenant in result["tenants"].values():
            if tenant["broken"] or tenant["unexplained"]:
                sys.exit(f"{queue}: no answer, or a refusal that lacks its reason: {tenant}")
    held = ", ".join(
        f"{throughput(result):.2f}× with the queue {queue}" for queue, result in results.items()
    )
    lines = [
        "# Overload: three times the capacity",
        "",
        f"{WORKERS} simulated engines of {SLOTS} slots; {len(common)} prompts that were answered "
        "both times got the same answers. Tenants: urgent has priority 10, batch −1, the "
        "others 0. Their fair share is max-min: modest asks for less than an equal part and may "
        "have all of it, flood and brisk divide what is left. Times are of whole "
        "answers, as multiples of their time without a queue. One run, 2 cores.",
        "",
        f"Throughput while the load lasted, of the capacity measured before: {held}.",
        "",
        "| queue | tenant | asked | share of what was served | of its fair share "
        "| time p50 / p99 | refused | Retry-After |",
        "|---|---|---|---|---|---|---|---|",
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
