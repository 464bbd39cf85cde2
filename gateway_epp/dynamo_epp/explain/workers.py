"""The pool's workers as plain data, as `/debug/workers` shows them."""

from __future__ import annotations

from typing import Any

from dynamo_epp.endpoints.circuits import told
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker


def pool_state(pool: Pool, now: float) -> dict[str, Any]:
    """All workers at ``now`` (monotonic seconds)."""
    return {
        "warm": pool.warm(),
        "workers": [_worker(pool, worker, now) for worker in pool.workers.values()],
    }


def _worker(pool: Pool, worker: Worker, now: float) -> dict[str, Any]:
    load = worker.load
    return {
        "name": worker.name,
        "endpoint": worker.endpoint.hostport,
        "role": worker.endpoint.role,
        "state": worker.state(),
        "problem": worker.problem,
        "circuit": told(worker, now),
        "load_problem": worker.load_problem,
        "models": sorted(worker.models),
        "block_size": worker.block_size,
        "cached_blocks": pool.cached_blocks(worker),
        "active_requests": load.active_requests(),
        "active_prefill_tokens": load.active_prefill_tokens(now),
        "active_decode_blocks": load.active_decode_blocks(),
        "figures_age_s": load.age(now),
        "waiting": load.waiting,
        "kv_blocks_used": load.kv_blocks_used,
        "kv_blocks_total": load.kv_blocks_total,
        "pickers": load.pickers,
    }
