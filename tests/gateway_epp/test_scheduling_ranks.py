"""Data-parallel ranks behind one port: which one a prompt is sent to, and what is known of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import numpy as np
import zmq
import zmq.asyncio
from aiohttp import web
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.stock import StockFollower
from dynamo_epp.endpoints.worker import Rank, Worker
from dynamo_epp.scheduling.candidates import candidates, overlaps
from dynamo_epp.scheduling.ranks import ENGINES_CHOICE, best_rank
from dynamo_runtime.discovery import Endpoint
from hypothesis import given
from hypothesis import strategies as st

BLOCK = 16
PROMPT = np.arange(64, dtype=np.uint32)


def ranks(*requests: int) -> list[Rank]:
    return [Rank(number, 10 + number, reported=count) for number, count in enumerate(requests)]


def test_the_rank_that_caches_the_prompt_gets_it() -> None:
    assert best_rank(ranks(0, 0, 0), {11: 3, 12: 2}, 4) == (1, 3)


def test_where_nobody_caches_it_the_engine_chooses() -> None:
    assert best_rank(ranks(0, 5), {10: 0}, 4) == (ENGINES_CHOICE, 0)
    assert best_rank(ranks(0, 5), None, 4) == (ENGINES_CHOICE, 0)


def test_a_busy_rank_does_not_get_everything_for_its_prefix() -> None:
    assert best_rank(ranks(1, 0), {10: 3}, 4) == (1, 0)
    assert best_rank(ranks(1, 1), {10: 3}, 4) == (0, 3)


def test_what_this_picker_sent_counts_before_the_metrics_tell() -> None:
    first, second = ranks(0, 0)
    first.booked = 1
    assert best_rank([first, second], {10: 3}, 4) == (1, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), min_size=1, max_size=4))
def test_no_rank_is_cheaper_than_the_chosen_one(state: list[tuple[int, int]]) -> None:
    every = ranks(*(requests for requests, _ in state))
    depths = {rank.slot: depth for rank, (_, depth) in zip(every, state, strict=True)}
    number, cached = best_rank(every, depths, 8)
    if number == ENGINES_CHOICE:
        assert not any(depths.values())
        return
    costs = [8 - depths[rank.slot] + 8 * rank.requests for rank in every]
    assert costs[number] == min(costs)
    assert cached == depths[10 + number]


class Engine:
    """A stock engine with two ranks: an event socket each, one port for requests."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._context = zmq.asyncio.Context()
        stack.callback(self._context.term)
        self.sockets: list[Any] = []
        self.ports: list[int] = []
        for _ in range(2):
            socket = self._context.socket(zmq.XPUB)
            self.ports.append(socket.bind_to_random_port("tcp://127.0.0.1"))
            self.sockets.append(socket)
            stack.callback(socket.close, 0)
        self.app = web.Application()
        self.app.router.add_get("/metrics", self.metrics)
        self.app.router.add_get("/v1/models", self.models)
        self.app.router.add_get("/kv_event_sources", self.sources)

    async def metrics(self, _: web.Request) -> web.Response:
        lines = ['vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0']
        for rank, running in enumerate((2, 1)):
            lines.append(f'vllm:num_requests_running{{engine="{rank}",model_name="m"}} {running}')
            lines.append(f'vllm:num_requests_waiting{{engine="{rank}",model_name="m"}} 1')
            lines.append(f'vllm:kv_cache_usage_perc{{engine="{rank}",model_name="m"}} 0.5')
        return web.Response(text="\n".join(lines) + "\n")

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "max_model_len": 512}]})

    async def sources(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                str(rank): {"endpoint": f"tcp://127.0.0.1:{port}", "topic": ""}
                for rank, port in enumerate(self.ports)
            }
        )

    async def store(self, rank: int, tokens: int) -> None:
        """Wait for the subscriber, then announce the first ``tokens`` of the prompt as cached."""
        await asyncio.wait_for(self.sockets[rank].recv(), 5)
        event = {
            "type": "BlockStored",
            "block_hashes": list(range(1, tokens // BLOCK + 1)),
            "parent_block_hash": None,
            "token_ids": PROMPT[:tokens].tolist(),
            "block_size": BLOCK,
            "lora_id": None,
        }
        batch = msgspec.msgpack.encode([0.0, [event], rank])
        await self.sockets[rank].send_multipart([b"", (0).to_bytes(8, "big"), batch])


@asynccontextmanager
async def followed() -> AsyncIterator[tuple[Engine, Pool, Worker]]:
    async with AsyncExitStack() as stack:
        engine = Engine(stack)
        runner = web.AppRunner(engine.app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        session = await stack.enter_async_context(aiohttp.ClientSession())

        class Nothing:
            async def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
                await asyncio.Event().wait()
                yield ()

        pool = Pool(Nothing(), lambda pool, worker: StockFollower(pool, worker, session))
        await pool.apply((Endpoint("w-0", "127.0.0.1", runner.addresses[0][1], ready=True),))
        stack.push_async_callback(pool.stop)
        yield engine, pool, pool.workers["w-0"]


async def until(pool: Pool, condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            pool.changed.clear()
            await pool.changed.wait()


async def test_each_rank_has_a_cache_of_its_own() -> None:
    async with followed() as (engine, pool, worker):
        await engine.store(0, 16)
        await engine.store(1, 48)
        await until(pool, lambda: worker.exact)
        assert [rank.number for rank in worker.ranks] == [0, 1]
        assert [pool.index.blocks(rank.slot) for rank in worker.ranks] == [1, 3]
        assert pool.cached_blocks(worker) == 4
        assert [rank.reported for rank in worker.ranks] == [3, 2]
        chains = {worker.chain("m")}
        matched = overlaps(pool.index, chains, PROMPT, ())
        [found] = candidates(pool.workers.values(), "m", matched, pool.index, 0.0, 4)
        assert (found.rank, found.overlap_blocks, found.cached_blocks) == (1, 3, 4)

        slots = worker.slots
        await pool.apply(())
        assert not any(pool.index.blocks(slot) for slot in slots)
