"""Engines that bring their KV events: from their sockets to the index, and what is not believed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
from aiohttp import web
from dynamo_epp.endpoints import stock as stock_module
from dynamo_epp.endpoints.inbox import UNREAD_BYTES, EventInbox, Unread, outcomes, sender
from dynamo_epp.endpoints.pool import Follower, Pool
from dynamo_epp.endpoints.stock import StockFollower, binds
from dynamo_epp.endpoints.worker import Worker
from dynamo_runtime.discovery import Endpoint
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

BLOCK = 16
NOWHERE = "tcp://127.0.0.1:*"


def stored(number: int, tokens: range) -> bytes:
    """The payload of a prompt's only block; engines name it ``number``."""
    event = {
        "type": "BlockStored",
        "block_hashes": [number],
        "parent_block_hash": None,
        "token_ids": list(tokens),
        "block_size": BLOCK,
    }
    return msgspec.msgpack.encode([0.0, [event], 0])


CLEARED = msgspec.msgpack.encode([0.0, [{"type": "AllBlocksCleared"}], 0])


class Engine:
    """A stock engine that connects to whoever wants its events."""

    def __init__(self, told: dict[str, Any] | None = None) -> None:
        self.running = 0
        self.app = web.Application()
        self.app.router.add_get("/metrics", self._metrics)
        self.app.router.add_get("/v1/models", self._models)
        if told is not None:
            self.app.router.add_get("/kv_event_sources", self._sources)
        self._told = told
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.topic = b""

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            text=f'vllm:cache_config_info{{block_size="{BLOCK}",num_gpu_blocks="100"}} 1.0\n'
            f"vllm:num_requests_running {self.running}\nvllm:num_requests_waiting 0\n"
            "vllm:kv_cache_usage_perc 0\n"
        )

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def _sources(self, _: web.Request) -> web.Response:
        return web.json_response(self._told)

    def connect(self, address: str) -> None:
        self._socket.connect(address)

    def say(self, number: int, payload: bytes, topic: bytes = b"") -> None:
        frames = [topic or self.topic, number.to_bytes(8, "big"), payload]
        self._socket.send_multipart(frames)

    def close(self) -> None:
        self._socket.close()


class Scene:
    """A pool of one engine and an inbox."""

    def __init__(self, pool: Pool, inbox: EventInbox, engine: Engine) -> None:
        self.pool, self.inbox, self.engine = pool, inbox, engine
        self.registry = CollectorRegistry()

    @property
    def worker(self) -> Worker:
        return self.pool.workers["w-0"]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await self.asked()

    async def asked(self) -> None:
        """Until the engine has been asked again, which shows in the pool."""
        self.pool.changed.clear()
        await self.pool.changed.wait()

    def blocks(self) -> int:
        return self.pool.cached_blocks(self.worker)


class Nobody:
    """Follows nothing."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Never:
    async def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        await asyncio.get_running_loop().create_future()
        yield ()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_module, "SCRAPE_S", 0.04)
    monkeypatch.setattr(stock_module, "FIGURES_S", 0.02)


def count(counter_registry: CollectorRegistry, outcome: str) -> float:
    name = "dynamo_epp_kv_event_messages_total"
    return counter_registry.get_sample_value(name, {"outcome": outcome}) or 0.0


@asynccontextmanager
async def scene(
    told: dict[str, Any] | None = None, *, listens: bool = True
) -> AsyncIterator[Scene]:
    engine = Engine(told)
    runner = web.AppRunner(engine.app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    registry = CollectorRegistry()
    async with aiohttp.ClientSession() as session:

        def follow(pool: Pool, worker: Worker) -> Follower:
            if worker.name != "w-0":
                return Nobody()
            return StockFollower(pool, worker, session, inbox=inbox if listens else None)

        pool = Pool(Never(), follow)
        inbox = EventInbox(NOWHERE, "kv@", pool, outcomes(registry))
        inbox.start()
        engine.topic = f"kv@127.0.0.1:{port}@m".encode()
        engine.connect(inbox.address)
        it = Scene(pool, inbox, engine)
        it.registry = registry
        try:
            await pool.apply((Endpoint("w-0", "127.0.0.1", port, ready=True),))
            yield it
        finally:
            await pool.stop()
            await inbox.stop()
            engine.close()
            await runner.cleanup()


async def spoken(it: Scene, payload: bytes) -> None:
    """Say the first message until it has come: a PUB socket drops what nobody listens to yet."""
    async with asyncio.timeout(10):
        while not count(it.registry, "taken"):
            it.engine.say(0, payload)
            await it.asked()


SENDS = {"0": {"endpoint": "tcp://epp:5557", "topic": "kv@…@m"}}


@pytest.mark.parametrize("told", [SENDS, None, {}])
async def test_what_an_engine_brings_is_in_the_index(told: dict[str, Any] | None) -> None:
    async with scene(told) as it:
        await spoken(it, stored(1, range(BLOCK)))
        await it.until(lambda: it.worker.live and it.worker.exact and it.blocks() == 1)
        assert it.worker.tracked
        it.engine.say(1, stored(2, range(BLOCK, 2 * BLOCK)))
        await it.until(lambda: it.blocks() == 2)
        it.engine.say(2, CLEARED)
        await it.until(lambda: it.blocks() == 0)
        assert it.worker.exact


async def test_a_gap_is_approximate_until_the_cache_is_cleared() -> None:
    """There is nobody to ask for what is missing."""
    async with scene(SENDS) as it:
        await spoken(it, stored(1, range(BLOCK)))
        await it.until(lambda: it.worker.exact and it.blocks() == 1)
        it.engine.say(4, stored(2, range(BLOCK, 2 * BLOCK)))
        await it.until(lambda: not it.worker.exact)
        assert it.worker.problem == "some of the engine's events are lost"
        assert it.blocks() == 1
        it.engine.say(5, CLEARED)
        it.engine.say(6, stored(3, range(BLOCK)))
        await it.until(lambda: it.worker.exact and it.blocks() == 1)


async def test_an_engine_that_began_anew_caches_what_it_said_since() -> None:
    async with scene(SENDS) as it:
        await spoken(it, stored(1, range(BLOCK)))
        it.engine.say(1, stored(2, range(BLOCK, 2 * BLOCK)))
        await it.until(lambda: it.blocks() == 2)
        it.engine.say(0, stored(3, range(2 * BLOCK, 3 * BLOCK)))
        await it.until(lambda: it.blocks() == 1)
        assert it.worker.exact


async def test_an_idle_engine_of_which_nothing_came_caches_nothing() -> None:
    async with scene(SENDS) as it:
        await it.until(lambda: it.worker.live)
        assert it.worker.exact


async def test_strangers_are_counted_and_change_nothing() -> None:
    async with scene(SENDS) as it:
        await spoken(it, stored(1, range(BLOCK)))
        await it.until(lambda: it.blocks() == 1)
        for topic in (b"kv@10.9.8.7@m", b"kv@127.0.0.1:1@m", b"kv@w-1@m"):
            it.engine.say(0, CLEARED, topic)
        it.engine.say(0, CLEARED, b"kv@nobody")
        await it.until(lambda: count(it.registry, "malformed") == 1)
        assert count(it.registry, "unknown-sender") == 3
        assert it.blocks() == 1


@pytest.mark.parametrize("name", ["127.0.0.1", "w-0"])
async def test_an_address_or_a_pods_name_is_enough(name: str) -> None:
    async with scene(SENDS) as it:
        it.engine.topic = f"kv@{name}@org/m@1".encode()
        await spoken(it, stored(1, range(BLOCK)))
        await it.until(lambda: it.blocks() == 1)


async def test_an_address_of_several_endpoints_names_none_of_them() -> None:
    async with scene(SENDS) as it:
        one = it.worker.endpoint
        await it.pool.apply((one, Endpoint("w-1", one.address, one.port + 1, ready=True)))
        it.engine.topic = b"kv@127.0.0.1@m"
        async with asyncio.timeout(10):
            while not count(it.registry, "unknown-sender"):
                it.engine.say(0, stored(1, range(BLOCK)))
                await it.asked()
        assert count(it.registry, "taken") == 0


async def test_without_a_port_for_them_the_reason_is_told() -> None:
    async with scene(SENDS, listens=False) as it:
        await it.until(lambda: it.worker.live)
        assert not it.worker.tracked
        assert it.worker.problem.startswith("the engine sends its events to tcp://epp:5557, and")


async def test_a_taken_port_is_an_error_that_names_it() -> None:
    pool = Pool(Never(), lambda *_: pytest.fail("nobody joins"))
    one = EventInbox(NOWHERE, "kv@", pool, outcomes(CollectorRegistry()))
    one.start()
    try:
        other = EventInbox(one.address, "kv@", pool, outcomes(CollectorRegistry()))
        with pytest.raises(OSError, match=f"received on {one.address}: Address already in use"):
            other.start()
    finally:
        await one.stop()


async def test_those_who_left_are_forgotten() -> None:
    async with scene(SENDS) as it:
        await spoken(it, stored(1, range(BLOCK)))
        gone = it.worker
        await it.pool.apply(())
        await it.pool.apply((gone.endpoint,))
        it.inbox.unread(it.worker)
        assert not it.inbox.heard(gone)


async def test_what_is_unread_is_bounded() -> None:
    unread, large = Unread(), [b"", b"", bytes(UNREAD_BYTES // 4)]
    assert [unread.put(large) for _ in range(6)] == [0, 0, 0, 0, 4, 0]
    assert [await unread.poll(1), len(await unread.recv_multipart())] == [1, 3]
    await unread.recv_multipart()
    assert await unread.poll(1) == 0


@pytest.mark.parametrize(
    ("topic", "name"),
    [
        (b"kv@10.0.0.1@m", "10.0.0.1"),
        (b"kv@10.0.0.1:8000@org/m@v1", "10.0.0.1:8000"),
        (b"kv@[fd00::1]:8000@m", "[fd00::1]:8000"),
        (b"kv@@m", ""),
        (b"kv@10.0.0.1", ""),
        (b"", ""),
    ],
)
def test_who_speaks(topic: bytes, name: str) -> None:
    assert sender(topic) == name


@given(st.binary())
def test_no_topic_breaks_anything(topic: bytes) -> None:
    assert isinstance(sender(topic), str)


@pytest.mark.parametrize(
    ("endpoint", "bound"),
    [
        ("tcp://*:5557", True),
        ("tcp://[::]:5557", True),
        ("ipc:///events/kv", True),
        ("tcp://epp.ns.svc:5557", False),
        ("tcp://0.0.0.0:5557", False),
        ("tcp://10.0.0.2:5557", False),
        ("tcp://10.0.0.1:5557", True),
    ],
)
def test_where_vllm_binds(endpoint: str, bound: bool) -> None:
    assert binds(endpoint, "10.0.0.1") == bound
