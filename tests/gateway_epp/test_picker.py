"""The picker over real worker streams: what it picks, books, and tells afterwards."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import pytest
from dynamo_epp.admission.endpoints import PoolEndpoints
from dynamo_epp.admission.gate import Gate
from dynamo_epp.admission.metrics import AdmissionMetrics
from dynamo_epp.admission.settings import (
    FlowControlSettings,
    IdentitySettings,
    RateLimit,
    RateLimits,
)
from dynamo_epp.config import given_config
from dynamo_epp.endpoints.breaker import BreakerSettings
from dynamo_epp.endpoints.circuits import Circuits
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.streams import StreamFollower
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.explain import Journal
from dynamo_epp.extproc import PickRequest, Refusal, RequestHead, Route
from dynamo_epp.metrics import PickerMetrics
from dynamo_epp.picker import KvPicker
from dynamo_epp.picker.bookings import LATE_S
from dynamo_epp.requests import ChatPrompt, Kind, ParsedRequest
from dynamo_epp.scheduling.disagg import DisaggPolicy
from dynamo_epp.server import AccessEntry
from dynamo_epp.tokenization import Encoded
from dynamo_epp.tokenize import NotExact
from dynamo_kv_router.choice import Policy
from dynamo_kv_router.keys import block_keys, model_seed
from dynamo_kv_router.stream.format import Load, WorkerInfo
from dynamo_kv_router.stream.publisher import WorkerPublisher
from dynamo_runtime.discovery import Endpoint
from dynamo_runtime.prefill_grant import Grant
from prometheus_client import CollectorRegistry

BLOCK = 4


class WordTokens:
    """One token a word of the last message; content "?" can't be tokenized."""

    def __init__(self) -> None:
        self.checked: list[tuple[str, int, int]] = []

    async def encode(self, request: ParsedRequest, _: list[Worker]) -> Encoded:
        assert isinstance(request.prompt, ChatPrompt)
        content = request.prompt.messages[-1]["content"]
        if content == "?":
            raise NotExact("this one can't be known")
        return Encoded(np.array([int(word) for word in content.split()], dtype=np.uint32))

    def on_described(self, worker: Worker, info: WorkerInfo) -> None:
        pass

    def check(self, worker: Worker, model: str, kind: Kind, predicted: int, reported: int) -> None:
        self.checked.append((worker.name, predicted, reported))


class Snapshots:
    """An endpoint source that the test feeds."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[Endpoint, ...]] = asyncio.Queue()

    async def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        while True:
            yield await self.queue.get()


class Time:
    """The loop's clock, and what the test skips."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def skip(self, seconds: float) -> None:
        self._skipped += seconds

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self._skipped


@dataclass
class World:
    """A picker, its workers' publishers and a clock."""

    picker: KvPicker
    pool: Pool
    source: Snapshots
    publishers: list[WorkerPublisher]
    endpoints: list[Endpoint]
    tokens: WordTokens
    journal: Journal
    registry: CollectorRegistry
    time: Time

    def worker(self, number: int) -> Worker:
        return self.pool.workers[f"w-{number}"]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.pool.changed.clear()
                await asyncio.wait([asyncio.ensure_future(self.pool.changed.wait())], timeout=0.01)

    async def ask(
        self, words: Sequence[int] | str, request_id: str = "r", **extra: object
    ) -> Route:
        answer = await self.picker.pick(request(words, request_id, **extra))
        assert isinstance(answer, Route), answer
        return answer

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def request(words: Sequence[int] | str, request_id: str = "r", **extra: object) -> PickRequest:
    content = words if isinstance(words, str) else " ".join(map(str, words))
    body = {"model": "m", "messages": [{"role": "user", "content": content}], **extra}
    head = RequestHead("POST", "/v1/chat/completions", {"x-request-id": request_id})
    return PickRequest(head, json.dumps(body).encode())


def keys(words: Sequence[int], model: str = "m", lora: str = "") -> npt.NDArray[np.uint64]:
    return block_keys(words, BLOCK, seed=model_seed(model, lora))


def info(name: str) -> WorkerInfo:
    return WorkerInfo(
        worker=name,
        model="m",
        models=["m", "adapter"],
        loras=["adapter"],
        block_size=BLOCK,
        total_blocks=100,
        max_model_len=1000,
        max_num_batched_tokens=0,
        runtime="sim",
    )


@asynccontextmanager
async def world(
    workers: int = 2,
    policy: Policy | None = None,
    flow_control: FlowControlSettings | None = None,
    config: str = "",
    *,
    roles: str = "",
    disagg: DisaggPolicy | None = None,
    secret: bytes | None = None,
) -> AsyncIterator[World]:
    """``roles`` has a letter for each worker that prefills (p) or decodes (d)."""
    workers = len(roles) or workers
    names = {"p": "prefill", "d": "decode"}
    publishers = [WorkerPublisher("tcp://127.0.0.1:0", info(f"w-{n}")) for n in range(workers)]
    for publisher in publishers:
        await publisher.start()
    endpoints = [
        Endpoint(
            f"w-{n}",
            f"127.0.0.{n + 2}",
            8000,
            role=names[roles[n]] if roles else "worker",
            ready=True,
            stream_port=publisher.port,
        )
        for n, publisher in enumerate(publishers)
    ]
    source, tokens, journal = Snapshots(), WordTokens(), Journal(capacity=100)
    session = aiohttp.ClientSession()
    registry = CollectorRegistry()
    time = Time()
    given = given_config(None, config)

    def follow(pool: Pool, worker: Worker) -> StreamFollower:
        # The publishers are all on 127.0.0.1; the addresses of the engines differ.
        stream = replace(worker.endpoint, address="127.0.0.1")
        real, worker.endpoint = worker.endpoint, stream
        follower = StreamFollower(pool, worker, picker, session=session, subscriber="p", clock=time)
        worker.endpoint = real
        return follower

    pool = Pool(source, follow)
    gate = None
    if flow_control is not None:
        metrics = AdmissionMetrics(registry)
        gate = Gate(flow_control, PoolEndpoints(pool), metrics, clock=time)
    picker = KvPicker(
        pool,
        tokens,
        policy or Policy(),
        PickerMetrics(registry),
        journal,
        replica="p",
        rng=random.Random(0),
        clock=time,
        wall=lambda: 1000.0,
        warm_up_s=5.0,
        circuits=Circuits(BreakerSettings(), pool.workers.values, random.Random(0)),
        gate=gate,
        scheduler=given.scheduler if given else None,
        disagg=disagg,
        secret=secret,
    )
    await pool.start()
    source.queue.put_nowait(tuple(endpoints))
    assert await pool.wait_warm(5)
    try:
        yield World(picker, pool, source, publishers, endpoints, tokens, journal, registry, time)
    finally:
        await pool.stop()
        await session.close()
        for publisher in publishers:
            await publisher.stop()


async def test_the_worker_that_holds_the_prefix_is_picked() -> None:
    async with world() as w:
        w.publishers[1].store(keys(range(8)))
        await w.until(lambda: w.pool.index.blocks(1) == 2)
        route = await w.ask(range(12))
        assert route.endpoints[0] == "127.0.0.3:8000"
        assert route.endpoints == ("127.0.0.3:8000", "127.0.0.2:8000")
        assert route.routing == "exact;overlap=2/3;mode=kv"
        assert dict(route.set_headers) == {"x-dynamo-booking": "p-1;tokens=12;cached=8"}
        assert route.body is None
        entry = w.journal.get("r")
        assert entry is not None
        best, other = entry.to_json()["candidates"]
        assert (best["name"], best["overlap_blocks"], best["terms"]["prefill"]) == ("w-1", 2, 1.0)
        assert (other["name"], other["overlap_blocks"], other["dropped"]) == ("w-0", 0, "")
        assert w.metric("dynamo_epp_decisions_total", model="m", how="exact", mode="kv") == 1


async def test_an_adapter_and_a_salt_have_caches_of_their_own() -> None:
    async with world() as w:
        w.publishers[0].store(keys(range(8), lora="adapter"))
        await w.until(lambda: w.pool.index.blocks(0) == 2)
        assert "overlap=0/2" in (await w.ask(range(8))).routing
        assert "overlap=2/2" in (await w.ask(range(8), model="adapter")).routing
        assert "overlap=0/2" in (await w.ask(range(8), model="adapter", cache_salt="s")).routing


async def test_a_picker_that_starts_late_is_warm_at_once() -> None:
    async with world() as first:
        first.publishers[1].store(keys(range(8)))
        first.publishers[1].accepted("other-1", 8, 0)
        await first.until(lambda: first.pool.index.blocks(1) == 2)
        await first.pool.apply(())
        first.source.queue.put_nowait(tuple(first.endpoints))
        await first.until(lambda: len(first.pool.workers) == 2)
        assert await first.pool.wait_warm(5)
        assert first.worker(1).load.active_requests() == 1
        await first.ask(range(8))
        entry = first.journal.get("r")
        assert entry is not None
        assert entry.decision.how == "exact"
        overlaps = {s.candidate.name: s.candidate.overlap_blocks for s in entry.decision.ranked}
        assert overlaps == {"w-0": 0, "w-1": 2}


async def test_a_booking_lives_until_the_worker_says_the_request_ended() -> None:
    async with world(workers=1) as w:
        route = await w.ask(range(8), "one")
        load = w.worker(0).load
        assert (load.active_requests(), load.active_prefill_tokens(0)) == (1, 8)
        w.publishers[0].accepted("p-1", 8, 0)
        await w.until(lambda: not load.booked)
        assert load.active_requests() == 1
        w.publishers[0].first_token("p-1")
        await w.until(lambda: load.active_prefill_tokens(0) == 0)
        w.picker.released(route)
        assert load.active_requests() == 1  # Envoy is done, the worker has not said so
        w.publishers[0].finished("p-1", prompt_tokens=8, cached_tokens=4, completion_tokens=3)
        await w.until(lambda: load.active_requests() == 0)
        entry = w.journal.get("one")
        assert entry is not None
        assert entry.outcome["prompt_tokens"] == 8
        assert entry.outcome["cached_tokens"] == 4
        assert entry.outcome["first_token_s"] >= 0
        assert w.tokens.checked == [("w-0", 8, 8)]
        assert w.metric("dynamo_epp_blind_window_seconds_count") == 1


async def test_a_client_that_leaves_before_the_worker_saw_it_frees_the_booking() -> None:
    async with world(workers=1) as w:
        route = await w.ask(range(8))
        assert w.metric("dynamo_frontend_active_requests", model="m") == 1
        w.picker.released(route)
        assert w.worker(0).load.active_requests() == 0
        assert w.metric("dynamo_frontend_active_requests", model="m") == 0


async def test_a_retry_moves_the_booking_to_the_worker_that_took_it() -> None:
    async with world() as w:
        w.publishers[0].store(keys(range(8)))
        await w.until(lambda: w.pool.index.blocks(0) == 2)
        await w.ask(range(8))
        w.publishers[1].accepted("p-1", 8, 0)
        await w.until(lambda: w.worker(1).load.active_requests() == 1)
        assert w.worker(0).load.active_requests() == 0
        w.picker.on_access_log(access("r", upstream="127.0.0.3:8000", attempts=2))
        assert w.metric("dynamo_epp_picks_not_followed_total", reason="retried") == 1


async def test_sibling_requests_spread_by_what_was_just_booked() -> None:
    async with world(workers=4) as w:
        picked = {(await w.ask(range(n, n + 16))).endpoints[0] for n in (0, 100, 200, 300)}
        assert len(picked) == 4


async def test_what_can_not_be_tokenized_is_routed_by_load_and_says_so() -> None:
    async with world() as w:
        route = await w.ask("?")
        assert route.routing.startswith("load-only;")
        entry = w.journal.get("r")
        assert entry is not None
        assert (entry.reason, entry.prompt_tokens) == ("this one can't be known", -1)


async def test_a_lost_stream_makes_decisions_approximate_until_it_is_back() -> None:
    async with world() as w:
        w.publishers[1].store(keys(range(8)))
        await w.until(lambda: w.pool.index.blocks(1) == 2)
        await w.ask(range(8), "warm")
        w.pool.forget_cache(w.worker(1), "stream lost: test")
        route = await w.ask(range(8))
        assert route.routing.startswith("approximate;overlap=0/2")
        entry = w.journal.get("r")
        assert entry is not None
        assert entry.reason == "w-1: stream lost: test"


async def test_draining_terminating_and_unready_workers_are_dropped_with_the_reason() -> None:
    async with world(workers=4) as w:
        w.publishers[0].set_draining()
        await w.until(lambda: w.worker(0).load.draining)
        changed = [
            w.endpoints[0],
            replace(w.endpoints[1], terminating=True),
            replace(w.endpoints[2], ready=False),
            w.endpoints[3],
        ]
        w.source.queue.put_nowait(tuple(changed))
        await w.until(lambda: not w.worker(2).endpoint.ready)
        route = await w.ask(range(8))
        assert route.endpoints == ("127.0.0.5:8000",)
        entry = w.journal.get("r")
        assert entry is not None
        assert {c["name"]: c["dropped"] for c in entry.to_json()["candidates"]} == {
            "w-0": "draining",
            "w-1": "terminating",
            "w-2": "not ready",
            "w-3": "",
        }


async def test_slots_are_reused_without_inheriting_a_cache() -> None:
    async with world() as w:
        w.publishers[1].store(keys(range(8)))
        await w.until(lambda: w.pool.index.blocks(1) == 2)
        slot = w.worker(1).slot
        await w.pool.apply((w.endpoints[0],))
        assert w.pool.index.blocks(slot) == 0
        await w.pool.apply((w.endpoints[0], replace(w.endpoints[1], name="w-1", generation="b")))
        assert w.worker(1).slot == slot


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b'{"model": "other", "messages": []}', 404, "model_not_found"),
    ],
)
async def test_refusals_are_openai_errors_with_a_reason(
    body: bytes, status: int, code: str
) -> None:
    async with world(workers=1) as w:
        head = RequestHead("POST", "/v1/chat/completions", {"x-request-id": "r"})
        answer = await w.picker.pick(PickRequest(head, body))
        assert isinstance(answer, Refusal)
        assert answer.status == status
        assert json.loads(answer.body)["error"]["code"] == code
        assert dict(answer.headers)["x-llm-d-request-dropped-reason"]


async def test_a_model_is_unknown_only_once_every_worker_has_told_what_it_serves() -> None:
    async with world(workers=2) as w:
        silent = w.worker(1)
        silent.models = frozenset()  # as before its first word
        answer = await w.picker.pick(request(range(4), model="other"))
        assert isinstance(answer, Refusal)
        assert (answer.status, dict(answer.headers)["retry-after"]) == (503, "10")
        assert "1 worker has not told what it serves" in answer.body.decode()
        silent.endpoint = replace(silent.endpoint, terminating=True)
        answer = await w.picker.pick(request(range(4), model="other"))
        assert isinstance(answer, Refusal)
        assert answer.status == 404


async def test_nobody_ready_is_503() -> None:
    async with world(workers=1) as w:
        w.source.queue.put_nowait((replace(w.endpoints[0], ready=False),))
        await w.until(lambda: not w.worker(0).endpoint.ready)
        answer = await w.picker.pick(request(range(4)))
        assert isinstance(answer, Refusal)
        assert answer.status == 503
        assert dict(answer.headers)["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        assert int(dict(answer.headers)["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("subset", "picked"),
    [
        (("127.0.0.3:8000",), ("127.0.0.3:8000",)),
        (("127.0.0.3", "10.0.0.1:1"), ("127.0.0.3:8000",)),
        (("127.0.0.2:8000", "127.0.0.3:8000"), ("127.0.0.2:8000", "127.0.0.3:8000")),
    ],
)
async def test_a_subset_hint_is_kept_to(subset: tuple[str, ...], picked: tuple[str, ...]) -> None:
    async with world(workers=3) as w:
        route = await w.picker.pick(replace(request(range(4)), subset=subset))
        assert isinstance(route, Route)
        assert sorted(route.endpoints) == list(picked)


@pytest.mark.parametrize("subset", [(), ("10.0.0.1:8000",), ("127.0.0.2:8001",)])
async def test_a_subset_that_leaves_nobody_is_503(subset: tuple[str, ...]) -> None:
    async with world(workers=1) as w:
        answer = await w.picker.pick(replace(request(range(4)), subset=subset))
        assert isinstance(answer, Refusal)
        assert answer.status == 503
        assert b"the gateway allows" in answer.body
        assert dict(answer.headers)["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        assert int(dict(answer.headers)["retry-after"]) >= 1
        entry = w.journal.get("r")
        assert entry is not None
        assert [c["dropped"] for c in entry.to_json()["candidates"]] == [
            "outside the gateway's subset"
        ]


CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: prefix-cache-scorer
- type: queue-scorer
- type: utilization-filter
  parameters: {conditions: [{metric: active-requests, maxValue: 0}]}
- type: max-score-picker
  parameters: {maxNumOfEndpoints: 1}
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: utilization-filter
  - {pluginRef: prefix-cache-scorer, weight: 3}
  - {pluginRef: queue-scorer, weight: 2}
  - pluginRef: max-score-picker
"""


async def test_a_configuration_decides_and_its_scores_are_kept() -> None:
    async with world(config=CONFIG) as w:
        w.publishers[1].store(keys(range(8)))
        await w.until(lambda: w.pool.index.blocks(1) == 2)
        route = await w.ask(range(8))
        assert route.endpoints == ("127.0.0.3:8000",)
        assert route.routing == "exact;overlap=2/2;mode=profile"
        entry = w.journal.get("r")
        assert entry is not None
        told = entry.to_json()
        assert (told["profile"], told["scorers"]) == (
            "default",
            {"prefix-cache-scorer": 3.0, "queue-scorer": 2.0},
        )
        best, other = told["candidates"]
        assert best["scores"] == {"prefix-cache-scorer": 1.0, "queue-scorer": 1.0}
        assert (best["score"], best["cost"]) == (5.0, None)
        assert other["terms"] == {"prefix-cache-scorer": 0.0, "queue-scorer": 2.0}


async def test_filters_that_keep_everybody_back_are_429() -> None:
    async with world(workers=1, config=CONFIG) as w:
        await w.ask(range(8))
        answer = await w.picker.pick(request(range(8), "late"))
        assert isinstance(answer, Refusal)
        assert answer.status == 429
        assert dict(answer.headers)["x-llm-d-request-dropped-reason"] == "rejected-saturated"
        entry = w.journal.get("late")
        assert entry is not None
        (only,) = entry.to_json()["candidates"]
        assert only["dropped"] == "utilization-filter: active-requests is 1, above 0"


async def test_engines_without_events_are_known_by_what_was_sent_to_them() -> None:
    async with world(workers=3) as w:
        for number in range(3):
            w.worker(number).tracked = w.worker(number).exact = False
        first = await w.ask(range(128))
        w.picker.released(first)
        assert first.routing.startswith("approximate;overlap=0/32")
        again = await w.ask(range(192))
        assert again.routing.startswith("approximate;overlap=32/48")
        assert again.endpoints[0] == first.endpoints[0]


async def test_the_load_a_worker_publishes_about_itself_is_taken() -> None:
    async with world(workers=1) as w:
        w.publishers[0].set_load(Load(waiting=3, kv_blocks_used=5, kv_blocks_total=9))
        await w.until(lambda: w.worker(0).load.waiting == 3)
        assert w.worker(0).load.kv_blocks_total == 9
        assert w.worker(0).load.pickers == 1


async def test_kv_transfer_params_of_clients_are_removed() -> None:
    async with world(workers=1) as w:
        route = await w.ask(range(4), kv_transfer_params={"do_remote_prefill": True})
        assert route.body is not None
        assert "kv_transfer_params" not in json.loads(route.body)
        assert json.loads(route.body)["model"] == "m"


async def test_round_robin_takes_turns_and_reads_no_tokens() -> None:
    async with world(workers=3, policy=Policy(mode="round-robin")) as w:
        picked = [(await w.ask("?")).endpoints[0] for _ in range(6)]
        assert picked == [f"127.0.0.{n}:8000" for n in (2, 3, 4, 2, 3, 4)]


async def test_a_refusal_for_lack_of_workers_can_be_explained() -> None:
    async with world(workers=1) as w:
        w.source.queue.put_nowait((replace(w.endpoints[0], ready=False),))
        await w.until(lambda: not w.worker(0).endpoint.ready)
        await w.picker.pick(request(range(4), "refused"))
        entry = w.journal.get("refused")
        assert entry is not None
        assert [c["dropped"] for c in entry.to_json()["candidates"]] == ["not ready"]
        w.picker.on_access_log(access("refused", status=503))
        assert requests(w, "error") == 1
        assert w.metric("dynamo_frontend_active_requests", model="m") == 0


@pytest.mark.parametrize(
    ("status", "flags", "result"),
    [
        (200, (), "success"),
        (404, (), "error"),
        (200, ("upstream_protocol_error",), "error"),  # the engine died in mid-stream
        (504, ("stream_idle_timeout",), "error"),
        (200, ("downstream_connection_termination",), "cancelled"),
        (0, ("downstream_remote_reset",), "cancelled"),
    ],
)
async def test_requests_are_counted_by_how_they_really_ended(
    status: int, flags: tuple[str, ...], result: str
) -> None:
    async with world(workers=1) as w:
        w.picker.released(await w.ask(range(4)))
        w.picker.on_access_log(access("r", status=status, flags=flags))
        assert requests(w, result) == 1


async def test_the_end_of_a_request_older_than_the_journal_is_counted() -> None:
    async with world(workers=1) as w:
        long, short = await w.ask(range(4), "long"), await w.ask(range(4), "long too")
        for number in range(100):  # as many as the journal keeps
            w.picker.released(await w.ask(range(4), f"r-{number}"))
        assert w.journal.get("long") is None
        w.picker.on_access_log(access("long"))  # the log may come before the stream's end…
        w.picker.released(long)
        w.picker.released(short)
        w.picker.on_access_log(access("long too"))  # …or after it
        assert requests(w, "success") == 2
        entry = w.journal.get("long")
        assert entry is not None
        assert entry.outcome["status"] == 200


async def test_the_word_of_a_worker_that_comes_after_the_end_is_taken() -> None:
    async with world(workers=1) as w:
        w.picker.released(await w.ask(range(8)))
        w.publishers[0].accepted("p-1", 8, 0)
        w.publishers[0].finished("p-1", prompt_tokens=8, cached_tokens=4, completion_tokens=3)
        await w.until(lambda: bool(w.tokens.checked))
        assert w.worker(0).load.active_requests() == 0
        entry = w.journal.get("r")
        assert entry is not None
        assert entry.outcome["cached_tokens"] == 4


async def test_nothing_is_kept_of_requests_that_ended() -> None:
    async with world(workers=1) as w:
        kept = w.picker.kept_bookings
        # One that no worker ever took, one whose worker goes away before it said how it ended,
        # and one whose stream ends only after its worker has gone.
        w.picker.released(await w.ask(range(4)))
        routes = [await w.ask(range(4)) for _ in range(2)]
        for turn in (2, 3):
            w.publishers[0].accepted(f"p-{turn}", 4, 0)
        await w.until(lambda: w.metric("dynamo_epp_blind_window_seconds_count") == 2)
        w.picker.released(routes[0])
        assert kept() == 3
        await w.pool.apply(())
        assert kept() == 1
        for turn in (2, 3):
            w.publishers[0].finished(f"p-{turn}")
        w.picker.released(routes[1])
        w.time.skip(LATE_S)
        w.source.queue.put_nowait(tuple(w.endpoints))
        await w.until(lambda: bool(w.pool.workers) and w.worker(0).live)
        w.picker.released(await w.ask(range(4)))
        assert kept() == 1  # this one, for a while


async def test_a_worker_that_fails_in_a_row_gets_no_requests_and_the_reason_is_seen() -> None:
    async with world(workers=2, policy=Policy(mode="round-robin")) as w:
        for n in range(10):
            route = await w.ask(range(4), f"r-{n}")
            w.picker.released(route)
            failed = route.endpoints[0] == "127.0.0.2:8000"
            entry = access(
                f"r-{n}", upstream=route.endpoints[0], status=500 if failed else 200, last_byte_s=0
            )
            w.picker.on_access_log(entry)
        for n in range(4):
            assert (await w.ask(range(4), f"after-{n}")).endpoints == ("127.0.0.3:8000",)
        reason = "circuit open: 5 failures in a row (500)"
        told = w.journal.get("after-0")
        assert told is not None
        dropped = {c["name"]: c["dropped"] for c in told.to_json()["candidates"]}
        assert dropped == {"w-0": reason, "w-1": ""}
        shown = {each["name"]: each["circuit"] for each in w.picker.state()["workers"]}
        assert shown == {"w-0": reason, "w-1": ""}
        w.time.skip(6.5)
        probed = [await w.ask(range(4), f"probe-{n}") for n in range(4)]
        assert [r.endpoints[0] for r in probed].count("127.0.0.2:8000") == 1
        w.picker.on_access_log(access("probe-0", upstream="127.0.0.2:8000", last_byte_s=0))
        assert len((await w.ask(range(4))).endpoints) == 2


async def test_streams_that_break_again_and_again_open_the_circuit_and_one_loss_counts_once() -> (
    None
):
    async with world(workers=2) as w:
        for _ in range(10):
            w.picker.on_lost(w.worker(0), "timeout")
            w.worker(0).live = False  # as a follower leaves it
        assert w.worker(0).circuit == ""
        for _ in range(4):
            w.worker(0).live = True
            w.picker.on_lost(w.worker(0), "timeout")
        assert w.worker(0).circuit == "circuit open: 5 failures in a row (stream lost: timeout)"


async def test_a_request_for_workers_that_are_not_ready_is_held() -> None:
    async with world(workers=1, flow_control=FlowControlSettings()) as w:
        w.source.queue.put_nowait((replace(w.endpoints[0], ready=False),))
        await w.until(lambda: not w.worker(0).endpoint.ready)
        asked = asyncio.create_task(w.ask(range(8), "held"))
        await asyncio.sleep(0)
        assert not asked.done()
        w.source.queue.put_nowait((w.endpoints[0],))
        route = await asked
        assert route.endpoints == ("127.0.0.2:8000",)
        entry = w.journal.get("held")
        assert entry is not None
        assert entry.stages_ms["queue"] > 0
        unknown = await w.picker.pick(request(range(4), model="other"))
        assert isinstance(unknown, Refusal)
        assert unknown.status == 404


@pytest.mark.parametrize("hold_s", [0.0, 0.05])
async def test_what_is_wrong_with_each_worker_is_told_also_if_nobody_waits(hold_s: float) -> None:
    flow_control = FlowControlSettings(no_endpoint_request_ttl=hold_s)
    async with world(workers=1, flow_control=flow_control) as w:
        w.source.queue.put_nowait((replace(w.endpoints[0], ready=False),))
        await w.until(lambda: not w.worker(0).endpoint.ready)
        answer = await w.picker.pick(request(range(4), "refused"))
        assert isinstance(answer, Refusal)
        assert answer.status == 503
        entry = w.journal.get("refused")
        assert entry is not None
        assert [c["dropped"] for c in entry.to_json()["candidates"]] == ["not ready"]


async def test_a_rate_limit_is_corrected_by_what_the_worker_tells() -> None:
    flow_control = FlowControlSettings(
        identity=IdentitySettings(api_key=True),
        limits=RateLimits(default=RateLimit(tokens_per_s=10, burst_s=10)),
    )
    async with world(workers=1, flow_control=flow_control) as w:
        await w.ask(range(8), "one", max_tokens=1000)
        refused = await w.picker.pick(request(range(8)))
        assert isinstance(refused, Refusal)
        assert refused.status == 429
        headers = dict(refused.headers)
        assert headers["x-llm-d-request-dropped-reason"] == "rejected-rate-limited"
        assert 90 <= int(headers["retry-after"]) <= 110
        assert json.loads(refused.body)["error"]["code"] == "rejected_rate_limited"
        w.publishers[0].accepted("p-1", 8, 0)
        w.publishers[0].finished("p-1", prompt_tokens=8, cached_tokens=0, completion_tokens=2)
        await w.until(lambda: w.picker.kept_bookings() == 0)
        await w.ask(range(8), "two", max_tokens=1)


async def test_what_an_engine_refused_costs_no_tokens_however_much_was_asked_for() -> None:
    flow_control = FlowControlSettings(
        limits=RateLimits(default=RateLimit(tokens_per_s=10, burst_s=10)),
    )
    async with world(workers=1, flow_control=flow_control) as w:
        await w.ask(range(8), "one", max_tokens=10**400, n=10**400)
        refused = await w.picker.pick(request(range(8)))
        assert isinstance(refused, Refusal)
        # At most 128 answers of the longest that the engine allows, and the body.
        assert 128 * 100 <= int(dict(refused.headers)["retry-after"]) < 128 * 101
        w.publishers[0].accepted("p-1", -1, -1)
        w.publishers[0].finished(
            "p-1", prompt_tokens=-1, cached_tokens=-1, completion_tokens=-1, status=400
        )
        await w.until(lambda: w.picker.kept_bookings() == 0)
        await w.ask(range(8), "two", max_tokens=1)


async def test_a_prefill_worker_is_no_endpoint_for_those_who_wait() -> None:
    async with world(roles="pd", flow_control=FlowControlSettings()) as w:
        endpoints = PoolEndpoints(w.pool)
        assert [worker.name for worker in endpoints.eligible("m")] == ["w-1"]
        w.source.queue.put_nowait((w.endpoints[0], replace(w.endpoints[1], ready=False)))
        await w.until(lambda: not w.worker(1).endpoint.ready)
        asked = asyncio.create_task(w.ask(range(8), "held"))
        await asyncio.sleep(0)
        assert not asked.done()
        w.source.queue.put_nowait(tuple(w.endpoints))
        assert (await asked).endpoints == ("127.0.0.3:8000",)


@pytest.mark.parametrize("body", [None, b""])
async def test_models_can_be_asked_for_with_an_empty_body_as_without_one(
    body: bytes | None,
) -> None:
    async with world(workers=1) as w:
        asked = PickRequest(RequestHead("GET", "/v1/models", {"x-request-id": "r"}), body)
        answer = await w.picker.pick(asked)
        assert isinstance(answer, Route)


def requests(w: World, result: str) -> float:
    labels = {"endpoint": "chat_completions", "request_type": "unary", "status": result}
    return w.metric("dynamo_frontend_requests_total", model="m", **labels)


def access(request_id: str, **fields: object) -> AccessEntry:
    values: dict[str, object] = {
        "request_id": request_id,
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "flags": (),
        "details": "",
        "upstream": "",
        "attempts": 1,
        "first_byte_s": 0.1,
        "last_byte_s": 0.2,
        "request_bytes": 1,
        "response_bytes": 1,
        "routing": "",
    }
    return AccessEntry(**{**values, **fields})  # type: ignore[arg-type]


# --- prefill and decode apart

SECRET = b"0123456789abcdef"


async def test_a_request_is_given_a_decode_worker_and_prefill_workers_under_a_signature() -> None:
    async with world(roles="ppd", secret=SECRET) as w:
        w.publishers[1].store(keys(range(8)))
        await w.until(lambda: w.pool.index.blocks(1) == 2)
        route = await w.ask(range(12))
        assert route.endpoints == ("127.0.0.4:8000",)
        assert route.routing == "exact;overlap=0/3;mode=kv;disagg=prefill-decode;prefill=2/3"
        headers = dict(route.set_headers)
        assert headers["x-dynamo-booking"] == "p-1;tokens=12;cached=12"
        assert headers["x-prefiller-host-port"] == "127.0.0.3:8000,127.0.0.2:8000"
        grant = Grant(
            ("127.0.0.3:8000", "127.0.0.2:8000"), "p-1", 1060, False, 0, cached_tokens=(8, 0)
        )
        assert headers.items() >= dict(grant.headers(SECRET)).items()
        loads = [w.worker(n).load for n in range(3)]
        assert [load.active_prefill_tokens(0) for load in loads] == [0, 4, 0]
        assert [load.active_decode_blocks() for load in loads] == [0, 3, 3]
        entry = w.journal.get("r")
        assert entry is not None
        told = entry.to_json()["disagg"]
        assert (told["decision"], told["reason"]) == ("prefill-decode", "")
        assert [c["name"] for c in told["candidates"]] == ["w-1", "w-0"]
        labels = {"model": "m", "decision": "prefill-decode", "reason": ""}
        assert w.metric("dynamo_epp_disagg_decisions_total", **labels) == 1
        assert w.metric("dynamo_component_router_kv_hit_rate_sum", model="m") == 2 / 3


async def test_each_worker_tells_of_its_own_half() -> None:
    async with world(roles="ppd", secret=SECRET) as w:
        route = await w.ask(range(8))
        prefills, decodes = ("w-0", "w-1"), w.worker(2).load
        first, other = (0, 1) if w.worker(0).load.booked else (1, 0)
        w.publishers[2].accepted("p-1", 8, 8)
        # The first prefill worker could not be reached, so the decode worker asked the other one.
        w.publishers[other].accepted("p-1.prefill", 8, 4)
        await w.until(lambda: bool(w.worker(other).load.accepted and decodes.accepted))
        assert not w.worker(first).load.booked
        assert w.worker(other).load.active_prefill_tokens(0) == 4
        w.publishers[other].finished(
            "p-1.prefill", prompt_tokens=8, cached_tokens=4, completion_tokens=1, status=200
        )
        await w.until(lambda: not w.worker(other).load.accepted)
        assert decodes.active_requests() == 1
        w.publishers[2].first_token("p-1")
        w.publishers[2].finished("p-1", prompt_tokens=8, cached_tokens=0, completion_tokens=3)
        await w.until(lambda: not decodes.accepted)
        w.picker.released(route)
        assert w.picker.kept_bookings() == 0
        entry = w.journal.get("r")
        assert entry is not None
        assert entry.outcome["prefilled_by"] == prefills[other]
        assert entry.outcome["prefill_cached_tokens"] == 4
        assert "served_by" not in entry.outcome
        assert entry.outcome["completion_tokens"] == 3
        assert w.tokens.checked == [("w-2", 8, 8)]
        assert w.metric("dynamo_frontend_time_to_first_token_seconds_count", model="m") == 1


async def test_a_prefill_worker_that_is_asked_in_vain_again_and_again_gets_nothing() -> None:
    async with world(roles="ppd", secret=SECRET) as w:
        dead, well = w.worker(0), w.worker(1)
        for turn in range(1, 6):
            assert dead.circuit == ""
            route = await w.ask(range(8), f"r-{turn}")
            w.publishers[2].accepted(f"p-{turn}", 8, 8)
            await prefill(w, 1, f"p-{turn}.prefill")
            w.publishers[2].first_token(f"p-{turn}", (dead.hostport,))
            w.publishers[2].finished(f"p-{turn}", prompt_tokens=8)
            await w.until(lambda: not w.worker(2).load.accepted)
            w.picker.released(route)
            told = outcome(w, turn)
            assert (told["prefillers_failed"], told["prefilled_by"]) == (["w-0"], "w-1")
        assert dead.circuit == "circuit open: 5 failures in a row (no prefill came of it)"
        assert well.circuit == ""
        prefillers = dict((await w.ask(range(8))).set_headers)["x-prefiller-host-port"]
        assert prefillers == well.hostport


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_prefill_that_came_of_it_ends_a_row_of_failures(streamed: bool) -> None:
    async with world(roles="pd", secret=SECRET) as w:
        breaker, address = w.worker(0).breaker, (w.worker(0).hostport,)
        for turn in range(1, 10):
            w.picker.released(await w.ask(range(8), f"r-{turn}"))
            w.publishers[1].accepted(f"p-{turn}", 8, 8)
            if turn == 5:
                await prefill(w, 0, f"p-{turn}.prefill")
                if streamed:
                    w.publishers[1].first_token(f"p-{turn}")
            failed = () if turn == 5 else address
            w.publishers[1].finished(f"p-{turn}", prompt_tokens=8, prefillers_failed=failed)
            await until_over(w, f"p-{turn}")
        assert breaker.reason == ""
        assert outcome(w, 9)["prefillers_failed"] == ["w-0"]


async def test_a_prefill_worker_that_answers_with_an_error_leaves_the_request_to_the_next() -> None:
    async with world(roles="ppd", secret=SECRET) as w:
        await w.ask(range(8), "r-1")
        await prefill(w, 0, "p-1.prefill", status=500)
        await prefill(w, 1, "p-1.prefill")
        assert outcome(w, 1)["prefilled_by"] == "w-1"


async def prefill(w: World, number: int, booking: str, status: int = 200) -> None:
    load, publisher = w.worker(number).load, w.publishers[number]
    publisher.accepted(booking, 8, 0)
    await w.until(lambda: bool(load.accepted))
    publisher.finished(booking, prompt_tokens=8, status=status)
    await w.until(lambda: not load.accepted)


async def until_over(w: World, booking: str) -> None:
    await w.until(lambda: booking not in w.picker._bookings)


def outcome(w: World, turn: int) -> dict[str, Any]:
    entry = w.journal.get(f"r-{turn}")
    assert entry is not None
    return entry.outcome


async def test_a_prefill_that_never_came_is_not_booked_beyond_the_first_token() -> None:
    async with world(roles="pd", secret=SECRET) as w:
        route = await w.ask(range(8))
        assert w.worker(0).load.active_requests() == 1
        w.publishers[1].accepted("p-1", 8, 8)
        w.publishers[1].first_token("p-1")
        await w.until(lambda: not w.worker(0).load.booked)
        w.picker.released(route)
        w.time.skip(LATE_S)
        w.publishers[1].finished("p-1", prompt_tokens=8)
        await w.until(lambda: not w.worker(1).load.accepted)
        w.picker.released(await w.ask(range(8), "next"))
        assert "p-1.prefill" not in w.picker._bookings


async def test_without_a_prefill_worker_the_policy_decides() -> None:
    down = "rejected-no-prefill-endpoints"
    async with world(roles="d", secret=SECRET) as w:
        route = await w.ask(range(8))
        assert route.routing.endswith("disagg=decode-only(no-prefiller)")
        assert dict(route.set_headers) == {"x-dynamo-booking": "p-1;tokens=8;cached=0"}
    async with world(roles="d", secret=SECRET, disagg=DisaggPolicy(enforce=True)) as w:
        answer = await w.picker.pick(request(range(8)))
        assert isinstance(answer, Refusal)
        assert (answer.status, dict(answer.headers)["x-llm-d-request-dropped-reason"]) == (
            503,
            down,
        )
        assert b"no prefill worker can take requests" in answer.body
        assert w.picker.kept_bookings() == 0
        labels = {"model": "m", "decision": "refused", "reason": "no-prefiller"}
        assert w.metric("dynamo_epp_disagg_decisions_total", **labels) == 1


async def test_without_a_secret_no_prefill_worker_is_named() -> None:
    async with world(roles="pd") as w:
        route = await w.ask(range(8))
        assert route.routing.endswith("disagg=decode-only(no-secret)")
        assert "x-prefiller-host-port" not in dict(route.set_headers)


async def test_what_two_workers_cannot_share_stays_with_one() -> None:
    async with world(roles="pd", secret=SECRET) as w:
        route = await w.ask(range(8), n=2)
        assert route.routing.endswith("disagg=decode-only(not-splittable)")


async def test_prefill_workers_are_no_room_for_a_request() -> None:
    async with world(roles="pd", secret=SECRET) as w:
        assert [one.name for one in PoolEndpoints(w.pool).eligible("m")] == ["w-1"]


async def test_a_gateways_subset_is_about_who_answers() -> None:
    async with world(roles="pdd", secret=SECRET) as w:
        asked = replace(request(range(8)), subset=("127.0.0.3:8000",))
        route = await w.picker.pick(asked)
        assert isinstance(route, Route)
        assert route.endpoints == ("127.0.0.3:8000",)
        assert dict(route.set_headers)["x-prefiller-host-port"] == "127.0.0.2:8000"


async def test_the_rank_that_caches_the_prompt_is_named_to_the_engine() -> None:
    async with world() as w:
        for number in (0, 1):
            w.pool.set_ranks(w.worker(number), range(2 - number))
        first, second = w.worker(0).ranks
        w.pool.index.store(second.slot, keys(range(8)))
        route = await w.ask(range(8))
        assert dict(route.set_headers)["x-data-parallel-rank"] == "1"
        assert route.endpoints == ("127.0.0.2:8000",)  # the other engine has no such rank
        assert (first.booked, second.booked) == (0, 1)
        w.picker.released(route)
        assert second.booked == 0

        route = await w.ask(range(100, 108))  # cached nowhere: the engine's choice
        assert "x-data-parallel-rank" not in dict(route.set_headers)
        assert len(route.endpoints) == 2
