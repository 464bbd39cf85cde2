"""What a planner decided, in words: the lines of `dynamo planner explain`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def explained(name: str, now: Json, moves: Sequence[Json]) -> Iterator[str]:
    """``now`` as `/planner` tells it, ``moves`` as `/planner/decisions?moved=1`, newest first."""
    config = now["config"]
    advisory = ", advisory: nothing is ordered" if config["advisory"] else ""
    yield f"{name}: mode {config['mode']}, target {config['optimization_target']}{advisory}"
    for note in now["notes"]:
        yield f"  note: {note}"
    last = now["last"]
    if last is None:
        yield "  nothing has been decided yet"
        return
    decision = last["decision"]
    yield f"  {last['wall']}  {decision['gpu_hours']:.2f} GPU hours so far"
    for role in decision["roles"]:
        yield from _role(role)
    for note in (*decision["limits"], *decision["notes"]):
        yield f"  {note}"
    yield "last moves:" if moves else "no moves yet"
    for move in moves:
        for order in move["decision"]["orders"]:
            yield (
                f"  {move['wall']}  {order['component']}  {order['before']} → {order['replicas']}  "
                f"{order['reason']}"
            )


def _role(role: Json) -> Iterator[str]:
    seen = role["observed"]
    moved = "" if role["replicas"] == role["desired"] else f" → {role['replicas']}"
    figures = [f"{seen['ready']} ready, {seen['seen']} seen ({seen['age_s']:.1f} s ago)"]
    for key, unit, scale in (
        ("rps", "requests/s", 1),
        ("ttft_s", "ms to the first token", 1000),
        ("itl_s", "ms between tokens", 1000),
    ):
        if seen[key] is not None:
            figures.append(f"{scale * seen[key]:.3g} {unit}")
    yield f"  {role['role']}: {role['desired']} replicas{moved}; {', '.join(figures)}"
    yield f"    {'keeps still: ' if role['held'] else ''}{role['reason']}"
    if role["throughput_reason"] and role["throughput_reason"] != role["reason"]:
        yield f"    foreseen: {role['throughput_reason']}"
    if seen["note"]:
        yield f"    {seen['note']}"
