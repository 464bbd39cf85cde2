"""A picker with two workers that say nothing by themselves, under a clock that the test sets."""

import json
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from dynamo_epp.admission.endpoints import PoolEndpoints
from dynamo_epp.admission.gate import Gate
from dynamo_epp.admission.metrics import AdmissionMetrics
from dynamo_epp.admission.settings import FlowControlSettings
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.explain import Journal
from dynamo_epp.extproc import PickRequest, Refusal, RequestHead, Route
from dynamo_epp.metrics import PickerMetrics
from dynamo_epp.picker import KvPicker
from dynamo_epp.requests import Kind, ParsedRequest
from dynamo_epp.tokenization import Encoded
from dynamo_kv_router.choice import Policy
from dynamo_kv_router.keys import block_keys, model_seed
from dynamo_kv_router.stream.format import WorkerInfo
from dynamo_runtime.endpoint import Endpoint
from prometheus_client import CollectorRegistry

BLOCK = 4


class Nothing:
    """A follower of a worker that never says anything, and a source of no endpoints."""

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        yield ()


class EightTokens:
    """Every prompt is the same eight tokens."""

    async def encode(self, request: ParsedRequest, workers: list[Worker]) -> Encoded:
        return Encoded(np.arange(8, dtype=np.uint32))

    def on_described(self, worker: Worker, info: WorkerInfo) -> None:
        pass

    def check(self, worker: Worker, model: str, kind: Kind, predicted: int, reported: int) -> None:
        pass


@dataclass
class Scene:
    """A picker with two workers, of which w-1 caches the first block of every prompt."""

    picker: KvPicker
    pool: Pool
    journal: Journal
    registry: CollectorRegistry
    now: list[float]

    async def ask(
        self,
        request_id: str = "r",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Route | Refusal:
        asked = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
        head = RequestHead(
            "POST", "/v1/chat/completions?a=b", {"x-request-id": request_id, **(headers or {})}
        )
        return await self.picker.pick(PickRequest(head, body or json.dumps(asked).encode()))


async def scene(
    *,
    stream_port: int | None = 5557,
    flow_control: FlowControlSettings | None = None,
    **options: Any,
) -> Scene:
    pool = Pool(Nothing(), lambda pool, worker: Nothing())
    await pool.apply(
        Endpoint(f"w-{n}", f"10.0.0.{n}", 8000, ready=True, stream_port=stream_port) for n in (0, 1)
    )
    for worker in pool.workers.values():
        pool.describe(
            worker,
            model="m",
            models=["m"],
            loras=[],
            block_size=BLOCK,
            total_blocks=100,
            max_model_len=100,
        )
        pool.set_live(worker, exact=True)
    pool.index.store(pool.workers["w-1"].slot, block_keys(range(4), BLOCK, seed=model_seed("m")))
    journal, registry, now = Journal(100), CollectorRegistry(), [0.0]
    if flow_control is not None:
        admission = AdmissionMetrics(registry)
        endpoints = PoolEndpoints(pool)
        options["gate"] = Gate(flow_control, endpoints, admission, clock=lambda: now[0])
    picker = KvPicker(
        pool,
        EightTokens(),
        Policy(),
        PickerMetrics(registry),
        journal,
        replica="p",
        rng=random.Random(0),
        clock=lambda: now[0],
        wall=lambda: 1000.0 + now[0],
        **options,
    )
    return Scene(picker, pool, journal, registry, now)
