"""Two simulated engines of four slots behind a frontend, and what they are asked in overload.

The benchmark and the end-to-end test run the same graph under the same load (`load.py`), for a
longer and a shorter time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.local_graph import Json, component, graph, measure

LOAD = Path(__file__).parent / "load.py"
WORKERS = 2
SLOTS = 4
PROFILE = {
    "prefill_tokens_per_s": 8000.0,
    "prefill_overhead_s": 0.01,
    "decode": [{"batch": 1, "step_s": 0.02}, {"batch": 64, "step_s": 0.02}],
}
EQUALS = ("flood", "brisk", "modest")
"""Tenants of `load.py` that have the same priority."""


def run(flow_control: Sequence[str], folder: Path, load: Sequence[str] = ()) -> Json:
    """What `load.py` saw, run with the options ``load`` against a frontend with these options.

    ``folder`` takes files that the graph needs.
    """
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
        component("Frontend", "frontend", [*identity, *flow_control], 1),
        component("Worker", "worker", sim, WORKERS),
    )
    slots = f"--slots={WORKERS * SLOTS}"
    return measure(manifest, LOAD, str([*flow_control]), folder, [slots, *load])


def throughput(result: Json) -> float:
    """Served a second under the load, of the capacity measured before."""
    served = sum(tenant["served_settled"] for tenant in result["tenants"].values())
    return float(served / result["load_s"] / result["capacity"])


def of_fair_share(result: Json) -> dict[str, float]:
    """What each of ``EQUALS`` was served, over its fair share of what all of them were."""
    tenants = {name: result["tenants"][name] for name in EQUALS}
    served = {name: tenant["served_settled"] for name, tenant in tenants.items()}
    asked = {name: tenant["asked_settled"] for name, tenant in tenants.items()}
    fair = max_min_shares(asked, sum(served.values()))
    return {name: served[name] / fair[name] for name in EQUALS}


def max_min_shares(demands: Mapping[str, float], supply: float) -> dict[str, float]:
    """Max-min fair shares: nobody gets more than it demands, and what one leaves the others share.

    From the smallest demand up, each gets its demand or an equal part of what is left (Bertsekas
    and Gallager, "Data Networks", 6.5.2).
    """
    shares = {}
    for left, (name, demand) in enumerate(sorted(demands.items(), key=lambda d: d[1])):
        shares[name] = min(demand, supply / (len(demands) - left))
        supply -= shares[name]
    return shares


def jain_index(shares: Sequence[float]) -> float:
    """``(Σ x)² / (n · Σ x²)``: 1 if all are equal, 1/n if one has everything.

    Source: Jain, Chiu, Hawe, "A quantitative measure of fairness", DEC-TR-301 (1984), where ``x``
    is what one got over its fair share.
    """
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))
