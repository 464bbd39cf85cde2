"""Which tokenizer a pool's requests go through, with workers that come, fail and go."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from dynamo_epp import tokenization as tokenization_module
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.metrics import PickerMetrics
from dynamo_epp.requests import Kind, ParsedRequest, parse
from dynamo_epp.tokenization import Tokenization
from dynamo_epp.tokenize import NotExact, TokenizerSource, TokenizeThreads
from dynamo_kv_router.load import WorkerLoad
from dynamo_kv_router.stream.format import WorkerInfo
from dynamo_runtime.discovery import Endpoint
from dynamo_workers.tiny import TOKENIZER_FILES, TOKENIZER_FOLDER
from prometheus_client import CollectorRegistry

FILES = {name: (TOKENIZER_FOLDER / name).read_bytes() for name in TOKENIZER_FILES}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


class Pod:
    """A worker's status server, and what it says of itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.works = True
        self.asked = 0
        self.app = web.Application()
        self.app.router.add_get("/tokenizer/{file}", self.file)
        self.worker: Worker

    async def file(self, request: web.Request) -> web.Response:
        self.asked += 1
        if not self.works:
            raise web.HTTPServiceUnavailable
        return web.Response(body=FILES[request.match_info["file"]])

    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker=self.name,
            model="m",
            models=["m"],
            loras=[],
            block_size=16,
            total_blocks=100,
            max_model_len=1000,
            max_num_batched_tokens=0,
            runtime="sim",
            tokenizer=HASHES,
        )


def chat() -> ParsedRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    return parse("/v1/chat/completions", json.dumps(body).encode())


@asynccontextmanager
async def pods(count: int) -> AsyncIterator[tuple[Tokenization, list[Pod]]]:
    made, runners = [Pod(f"w-{n}") for n in range(count)], []
    threads = TokenizeThreads()
    async with aiohttp.ClientSession() as session:
        for slot, pod in enumerate(made):
            runner = web.AppRunner(pod.app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            runners.append(runner)
            endpoint = Endpoint(
                # Nothing listens where the engine would be asked.
                pod.name, "127.0.0.1", 1, ready=True,
                stream_port=5557, status_port=runner.addresses[0][1],
            )  # fmt: skip
            pod.worker = Worker(endpoint, slot, WorkerLoad(block_size=16, confirms=True))
            pod.worker.models, pod.worker.live = frozenset({"m"}), True
        source = TokenizerSource(session, threads)
        tokenization = Tokenization(session, threads, source, PickerMetrics(CollectorRegistry()))
        try:
            yield tokenization, made
        finally:
            tokenization.stop()
            threads.close()
            for runner in runners:
                await runner.cleanup()


async def until(turn: Callable[[], object], condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            turn()
            await asyncio.sleep(0.005)


async def test_one_load_serves_all_workers_of_a_model() -> None:
    async with pods(3) as (tokenization, made):
        for pod in made:
            tokenization.on_described(pod.worker, pod.info())
        await tokenization.loaded(5)
        encoded = await tokenization.encode(chat(), [pod.worker for pod in made])
        assert encoded.distrust == ""
        assert len(encoded.tokens) > 1
        assert [pod.asked for pod in made] == [len(HASHES), 0, 0]


async def test_what_one_worker_could_not_give_is_fetched_from_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenization_module, "RETRY_S", 0.01)
    async with pods(2) as (tokenization, made):
        made[0].works = False
        for pod in made:
            tokenization.on_described(pod.worker, pod.info())
        await tokenization.loaded(5)
        workers = [pod.worker for pod in made]
        with pytest.raises(NotExact):
            await tokenization.encode(chat(), workers)
        # The first has gone; the other was never asked while its load was under way.
        made[0].worker.live = False
        await until(lambda: tokenization.keep_up(workers[1:]), lambda: made[1].asked > 0)
        await tokenization.loaded(5)
        assert len((await tokenization.encode(chat(), workers[1:])).tokens) > 1


async def test_a_tokenizer_that_never_loads_is_told_once_and_tried_less_and_less(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenization_module, "RETRY_S", 0.001)
    async with pods(1) as (tokenization, (pod,)):
        pod.works = False
        tokenization.on_described(pod.worker, pod.info())
        tries = 4 * len(HASHES)
        await until(lambda: tokenization.keep_up([pod.worker]), lambda: pod.asked >= tries)
        told = [record for record in caplog.records if "no tokenizer" in record.getMessage()]
        assert len(told) <= len(HASHES)  # the message names the file that failed first
        # Without the worker nothing is tried any more.
        await tokenization.loaded(5)
        asked = pod.asked
        tokenization.keep_up([])
        await tokenization.loaded(5)
        assert pod.asked == asked


async def test_counts_that_differ_for_one_kind_of_request_say_nothing_of_others() -> None:
    async with pods(1) as (tokenization, (pod,)):
        tokenization.on_described(pod.worker, pod.info())
        await tokenization.loaded(5)
        for _ in range(3):
            tokenization.check(pod.worker, "m", Kind.RESPONSE, 6, 5)
        body = json.dumps({"model": "m", "input": "hello"}).encode()
        other = await tokenization.encode(parse("/v1/responses", body), [pod.worker])
        assert "6 predicted, 5 reported" in other.distrust
        assert (await tokenization.encode(chat(), [pod.worker])).distrust == ""


class Engine:
    """A stock engine, asked for tokens; one that hangs answers when the test ends."""

    def __init__(self) -> None:
        self.hangs, self.refuses = False, False
        self.asked = 0
        self.app = web.Application()
        self.app.router.add_post("/tokenize", self.tokenize)

    async def tokenize(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        if self.refuses:
            raise web.HTTPServiceUnavailable
        return web.json_response({"tokens": [1, 2, 3]})


@asynccontextmanager
async def engines(count: int) -> AsyncIterator[tuple[Tokenization, list[Engine], list[Worker]]]:
    made, workers, runners = [Engine() for _ in range(count)], list[Worker](), []
    threads = TokenizeThreads()
    async with aiohttp.ClientSession() as session:
        for slot, engine in enumerate(made):
            runner = web.AppRunner(engine.app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            runners.append(runner)
            endpoint = Endpoint(f"w-{slot}", "127.0.0.1", runner.addresses[0][1], ready=True)
            workers.append(Worker(endpoint, slot, WorkerLoad(block_size=16, confirms=False)))
        source = TokenizerSource(session, threads)
        metrics = PickerMetrics(CollectorRegistry())
        try:
            yield Tokenization(session, threads, source, metrics), made, workers
        finally:
            threads.close()
            for runner in runners:
                await runner.cleanup()


async def test_an_engine_that_hangs_holds_up_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization_module, "SECOND_ASKED_S", 0.02)
    async with engines(2) as (tokenization, (hung, well), workers):
        hung.hangs = True
        async with asyncio.timeout(1.5):  # less than one question's own limit
            for _ in range(4):
                encoded = await tokenization.encode(chat(), workers)
                assert encoded.tokens.tolist() == [1, 2, 3]
        assert (hung.asked, well.asked) == (2, 4)
        workers[0].breaker.silent("no answer", 0.0)
        for _ in range(4):
            await tokenization.encode(chat(), workers)
        assert (hung.asked, well.asked) == (2, 8)
        workers[1].breaker.silent("no answer", 0.0)  # all are: then who hears nothing is it
        await tokenization.encode(chat(), workers)
        assert well.asked == 9


async def test_an_engine_that_refuses_is_followed_by_another_at_once() -> None:
    async with engines(2) as (tokenization, (refusing, well), workers):
        refusing.refuses = True
        for _ in range(4):
            await tokenization.encode(chat(), workers)
        assert (refusing.asked, well.asked) == (2, 4)
        well.refuses = True
        with pytest.raises(NotExact, match="answered 503"):
            await tokenization.encode(chat(), workers)
