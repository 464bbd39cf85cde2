"""The pool and its followers go on, whatever the source of endpoints or an engine does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from dynamo_epp.endpoints import pool as pool_module
from dynamo_epp.endpoints import pulse as pulse_module
from dynamo_epp.endpoints import stock as stock_module
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.stock import StockFollower
from dynamo_epp.endpoints.streams import StreamFollower
from dynamo_epp.endpoints.worker import Worker
from dynamo_kv_router.stream.format import Finished, Load, WorkerInfo
from dynamo_kv_router.stream.publisher import WorkerPublisher
from dynamo_runtime.discovery import Endpoint

ONE = Endpoint("w-0", "127.0.0.2", 8000, ready=True)
TWO = Endpoint("w-1", "127.0.0.3", 8000, ready=True)


class Nobody:
    """Follows nothing."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Breaking:
    """A source that fails after its first snapshot, and gives another one when asked anew."""

    def __init__(self) -> None:
        self.asked = 0

    async def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        self.asked += 1
        yield (ONE,) if self.asked == 1 else (ONE, TWO)
        if self.asked == 1:
            raise RuntimeError("connection reset by the API server")
        await asyncio.get_running_loop().create_future()


async def until(pool: Pool, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            pool.changed.clear()
            await pool.changed.wait()


async def test_a_source_that_fails_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "SOURCE_RETRY_S", 0.01)
    pool = Pool(Breaking(), lambda *_: Nobody())
    await pool.start()
    try:
        await until(pool, lambda: set(pool.workers) == {"w-0", "w-1"})
    finally:
        await pool.stop()


async def test_a_snapshot_that_can_not_be_published_does_not_end_the_pool() -> None:
    seen: list[int] = []

    def publish(snapshot: tuple[Endpoint, ...]) -> None:
        seen.append(len(snapshot))
        if len(seen) == 1:
            raise OSError("no space left on device")

    class Twice:
        async def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
            yield (ONE,)
            yield (ONE, TWO)
            await asyncio.get_running_loop().create_future()

    pool = Pool(Twice(), lambda *_: Nobody(), publish)
    await pool.start()
    try:
        await until(pool, lambda: len(pool.workers) == 2)
        assert seen == [1, 2]
    finally:
        await pool.stop()


class Engine:
    """What a stock engine answers; its fields may be set to nonsense."""

    def __init__(self) -> None:
        self.usage = "0.5"
        self.status = self.metrics_status = 200
        self.hangs: set[str] = set()  # paths that are answered when the test ends
        self.is_one = True
        self.questions: asyncio.Queue[str] = asyncio.Queue()
        self.app = web.Application()
        self.app.router.add_get("/metrics", self.metrics)
        self.app.router.add_get("/v1/models", self.models)

    async def metrics(self, request: web.Request) -> web.Response:
        if request.path in self.hangs:
            await asyncio.get_running_loop().create_future()
        return web.Response(
            status=self.metrics_status,
            text='vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'
            "vllm:num_requests_running 1.0\n"
            "vllm:num_requests_waiting 3.0\n"
            f"vllm:kv_cache_usage_perc {self.usage}\n",
        )

    async def models(self, request: web.Request) -> web.Response:
        self.questions.put_nowait(request.path)
        if request.path in self.hangs:
            await asyncio.get_running_loop().create_future()
        if self.status != 200:
            return web.Response(status=self.status)
        if not self.is_one:
            return web.json_response({"path": request.path})
        return web.json_response({"data": [{"id": "m", "max_model_len": 64}]})


@asynccontextmanager
async def followed(
    engine: Engine,
    asked: list[str] | None = None,
    *,
    rank: int | None = None,
    pulse: list[str] | None = None,
) -> AsyncIterator[tuple[Pool, Worker]]:
    runner = web.AppRunner(engine.app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:

        def on_asked(_: Worker, problem: str) -> None:
            if asked is not None:
                asked.append(problem)

        def on_pulse(worker: Worker, silence: str) -> None:
            if pulse is not None:
                pulse.append(silence)
                pool.changed.set()

        pool = Pool(
            Breaking(),
            lambda pool, worker: StockFollower(
                pool, worker, session, on_asked=on_asked, on_pulse=on_pulse
            ),
        )
        try:
            await pool.apply((Endpoint("w-0", "127.0.0.1", port, ready=True, rank=rank),))
            yield pool, pool.workers["w-0"]
        finally:
            await pool.stop()
            await runner.cleanup()


async def test_a_stock_engine_without_events_is_known_by_what_it_answers() -> None:
    async with followed(Engine()) as (pool, worker):
        await until(pool, lambda: worker.live)
        assert (worker.model, worker.block_size, worker.max_model_len) == ("m", 16, 64)
        assert (worker.load.waiting, worker.load.kv_blocks_used) == (3, 50)
        assert not worker.exact
        assert worker.problem == "the engine does not tell its event sockets (404)"


@pytest.mark.parametrize(
    ("rank", "ports"), [(0, [5557]), (1, [5558]), (None, [5557, 5558]), (7, [5557, 5558])]
)
async def test_a_port_of_one_rank_listens_to_its_events(rank: int | None, ports: list[int]) -> None:
    sources = {str(n): {"endpoint": f"tcp://*:{5557 + n}"} for n in (0, 1)}

    async def told(_: web.Request) -> web.Response:
        return web.json_response(sources)

    engine = Engine()
    engine.app.router.add_get("/kv_event_sources", told)
    async with followed(engine, rank=rank) as (pool, _):
        follower = pool._followers["w-0"]
        assert isinstance(follower, StockFollower)
        found = (await follower._event_sources()).values()
        assert [source._endpoint for source in found] == [f"tcp://127.0.0.1:{p}" for p in ports]


async def test_an_engine_that_answers_nonsense_is_asked_again() -> None:
    engine = Engine()
    engine.usage = "NaN"
    async with followed(engine) as (pool, worker):
        await until(pool, lambda: "not understood" in worker.problem)
        engine.usage = "0.25"
        await until(pool, lambda: worker.live)
        assert worker.load.kv_blocks_used == 25


async def test_whether_an_engine_answers_is_told_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_module, "SCRAPE_S", 0.01)
    monkeypatch.setattr(stock_module, "FIGURES_S", 0.01)
    monkeypatch.setattr(stock_module, "UNANSWERED_S", 0.01)
    engine, asked = Engine(), list[str]()
    async with followed(engine, asked) as (pool, worker):
        await until(pool, lambda: worker.live)
        assert set(asked) == {""}
        engine.status = 500
        await until(pool, lambda: not worker.live)
        assert asked[-3:] == [asked[-1]] * 3
        assert asked[-1].startswith("not answered: 500")
        engine.status = 200
        await until(pool, lambda: worker.live)
        assert asked[-1] == ""


@pytest.mark.parametrize("fault", ["503", "hangs"])
async def test_without_metrics_an_engine_is_as_good_as_before(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(stock_module, "SCRAPE_S", 0.01)
    monkeypatch.setattr(stock_module, "TIMEOUT_S", 0.05)
    engine, asked, pulse = Engine(), list[str](), list[str]()
    async with followed(engine, asked, pulse=pulse) as (pool, worker):
        await until(pool, lambda: worker.live)
        told_at = worker.load.observed_at
        if fault == "hangs":
            engine.hangs.add("/metrics")
        else:
            engine.metrics_status = 503
        await until(pool, lambda: bool(worker.load_problem))
        assert worker.load_problem.startswith("its metrics can't be had: ")
        for _ in range(3):
            await engine.questions.get()
        assert worker.live
        assert (worker.block_size, worker.load.waiting) == (16, 3)
        assert worker.load.observed_at == told_at or fault == "503"
        engine.hangs.clear()
        engine.metrics_status, engine.usage = 200, "0.75"
        await until(pool, lambda: worker.load.kv_blocks_used == 75)
        assert worker.load_problem == ""
        assert set(asked) == set(pulse) == {""}


async def test_an_engine_that_hangs_is_silent_and_then_heard_of_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stock_module, "SCRAPE_S", 0.01)
    monkeypatch.setattr(stock_module, "UNANSWERED_S", 0.01)
    monkeypatch.setattr(stock_module, "TIMEOUT_S", 0.1)
    engine, asked, pulse = Engine(), list[str](), list[str]()
    async with followed(engine, asked, pulse=pulse) as (pool, worker):
        await until(pool, lambda: worker.live)
        engine.hangs |= {"/v1/models", "/metrics"}
        await until(pool, lambda: bool(pulse[-1]))
        assert pulse[-1] == "no answer to 2 questions: timeout"
        await until(pool, lambda: not worker.live)
        engine.hangs.clear()
        await until(pool, lambda: worker.live)
        assert pulse[-1] == ""
        assert set(asked) == {""}


class Indifferent:
    """Whom nothing about requests concerns."""

    def on_accepted(self, worker: Worker, booking: str, blind_window_s: float | None) -> None: ...

    def on_first_token(self, worker: Worker, booking: str) -> None: ...

    def on_finished(self, worker: Worker, event: Finished) -> None: ...

    def on_described(self, worker: Worker, info: WorkerInfo) -> None: ...

    def on_lost(self, worker: Worker, reason: str) -> None: ...

    def on_resynced(self, worker: Worker) -> None: ...


@asynccontextmanager
async def launched(engine: Engine, pulse: list[str]) -> AsyncIterator[tuple[Pool, WorkerPublisher]]:
    """The stream of a launcher, followed; ``engine`` is what it launched."""
    engine.app.router.add_get("/health", engine.models)
    info = WorkerInfo(
        worker="w-0",
        model="m",
        models=["m"],
        block_size=16,
        total_blocks=100,
        max_model_len=64,
        max_num_batched_tokens=64,
        runtime="sim",
    )
    publisher = WorkerPublisher("tcp://127.0.0.1:0", info)
    runner = web.AppRunner(engine.app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await publisher.start()
    async with aiohttp.ClientSession() as session:

        def on_pulse(_: Worker, silence: str) -> None:
            pulse.append(silence)
            pool.changed.set()

        def follow(pool: Pool, worker: Worker) -> StreamFollower:
            return StreamFollower(
                pool,
                worker,
                Indifferent(),
                session=session,
                subscriber="p",
                clock=time.monotonic,
                on_pulse=on_pulse,
            )

        pool = Pool(Breaking(), follow)
        port = runner.addresses[0][1]
        endpoint = Endpoint("w-0", "127.0.0.1", port, ready=True, stream_port=publisher.port)
        try:
            await pool.apply((endpoint,))
            await until(pool, lambda: pool.workers["w-0"].live)
            yield pool, publisher
        finally:
            await pool.stop()
            await publisher.stop()
            await runner.cleanup()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse_module, "ASK_S", 0.01)
    monkeypatch.setattr(pulse_module, "ANSWER_S", 0.1)


@pytest.mark.usefixtures("soon")
async def test_an_engine_whose_launcher_gets_no_answer_is_asked_itself() -> None:
    engine, pulse = Engine(), list[str]()
    async with launched(engine, pulse) as (pool, publisher):
        publisher.set_load(Load(), asyncio.get_running_loop().time() - 4)
        await until(pool, lambda: bool(pulse))
        assert set(pulse) == {""}  # it lives: only the launcher gets no answer
        engine.hangs.add("/health")
        await until(pool, lambda: bool(pulse[-1]))
        assert pulse[-1].startswith("its launcher had no answer from the engine for 4 s")
        assert pulse[-1].endswith(", and no answer within 0.1 s")
        publisher.set_load(Load())
        await until(pool, lambda: pulse[-1] == "")


@pytest.mark.usefixtures("soon")
async def test_a_worker_whose_stream_alone_is_lost_still_lives() -> None:
    engine, pulse = Engine(), list[str]()
    async with launched(engine, pulse) as (pool, _):
        follower = pool._followers["w-0"]
        assert isinstance(follower, StreamFollower)
        follower.on_lost("w-0", "nothing heard for 3 s")
        assert not pool.workers["w-0"].live
        await until(pool, lambda: len(pulse) == 3)
        assert pulse == ["", "", ""]
        engine.hangs.add("/health")
        await until(pool, lambda: bool(pulse[-1]))
        assert pulse[-1] == "nothing heard for 3 s, and no answer within 0.1 s"


async def test_a_gap_in_a_stream_is_inexact_until_the_snapshot() -> None:
    async with launched(Engine(), []) as (pool, publisher):
        worker = pool.workers["w-0"]
        await until(pool, lambda: worker.exact)
        publisher.store([1])
        publisher.session.flush(0.0, 0.0)  # made, and never sent
        publisher.store([2])
        await until(pool, lambda: not worker.exact)
        assert worker.problem == "1 of its messages did not arrive; its snapshot is awaited"
        assert worker.live
        await until(pool, lambda: worker.exact)
        assert pool.index.blocks(worker.slot) == 2


async def test_failures_are_told_only_of_what_has_answered_as_an_engine() -> None:
    """A backend without an engine's routes stays eligible."""
    engine, asked = Engine(), list[str]()
    engine.is_one = False
    async with followed(engine, asked) as (pool, worker):
        async with asyncio.timeout(10):
            for _ in range(3):
                await engine.questions.get()
        assert asked == []
        engine.is_one = True
        await until(pool, lambda: worker.live)
        assert set(asked) == {""}
