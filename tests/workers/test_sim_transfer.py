"""KV transfer between simulated engines: the real protocol's parameters, leases and refusals."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from dynamo_runtime import timing_profile
from dynamo_workers.sim import scheduler as model
from dynamo_workers.sim.engine import Engine
from dynamo_workers.sim.errors import RequestError
from dynamo_workers.sim.transfer import Connector, TransferConfig

BLOCK = 16
PROMPT = list(range(100, 150))  # three full blocks and two tokens


@dataclass
class One:
    """An engine with its connector."""

    engine: Engine
    connector: Connector
    released: asyncio.Event  # a kept sequence's blocks were freed

    @property
    def pool(self) -> Any:
        return self.engine.scheduler.pool

    async def run(self, prompt: list[int], answer: int, **options: Any) -> model.Sequence:
        sequence = model.Sequence(prompt, list(range(answer)), **options)
        ended = asyncio.Event()

        def progress() -> None:
            if sequence.finished:
                ended.set()

        sequence.on_progress = progress
        self.engine.submit(sequence)
        await asyncio.wait_for(ended.wait(), 5)
        return sequence


@contextlib.asynccontextmanager
async def engine(role: str, policy: str = "recompute", lease_s: float = 30) -> AsyncIterator[One]:
    limits = model.Limits(block_size=BLOCK, total_blocks=64, max_model_len=512)
    scheduler = model.Scheduler(limits, timing_profile.DEFAULT, b"none")
    config = TransferConfig("NixlConnector", role, policy, {"kv_lease_duration": lease_s})
    connector = Connector(config, "127.0.0.1", 0, scheduler)
    one = One(Engine(scheduler, connector=connector, speed=0), connector, asyncio.Event())
    release = scheduler.release_kept

    def released(sequence: model.Sequence) -> None:
        release(sequence)
        one.released.set()

    scheduler.release_kept = released
    await one.engine.start()
    try:
        yield one
    finally:
        await one.engine.stop()


async def test_a_prompt_goes_from_one_engine_to_the_other() -> None:
    async with engine("kv_producer") as p, engine("kv_consumer") as d:
        hop1 = await p.run(PROMPT, 1, keep_as="r-1")
        params = hop1.transfer_params
        assert params is not None
        assert params["do_remote_prefill"] is True
        assert params["remote_num_tokens"] == len(PROMPT)
        assert len(params["remote_block_ids"][0]) == 4
        assert p.pool.used_count == 4

        tokens = await d.connector.fetch(params, PROMPT)
        assert (tokens, p.pool.used_count) == (len(PROMPT), 0)
        hop2 = await d.run(PROMPT, 5, external=tokens)
        assert (hop2.external_tokens, hop2.cached_tokens) == (len(PROMPT) - 1, 0)
        assert d.engine.metrics.external_prompt_tokens == len(PROMPT) - 1
        # What was received is cached and announced like what was computed.
        assert (await d.run(PROMPT, 1)).cached_tokens == 48
        again = await d.run(PROMPT, 1, external=len(PROMPT))
        assert (again.cached_tokens, again.external_tokens) == (48, 1)


async def test_blocks_are_fetched_once() -> None:
    async with engine("kv_producer") as p, engine("kv_consumer") as d:
        params = (await p.run(PROMPT, 1, keep_as="r-1")).transfer_params
        assert params is not None
        assert await d.connector.fetch(params, PROMPT) == len(PROMPT)
        assert await d.connector.fetch(params, PROMPT) == 0
        assert (d.connector.counts.transfers, d.connector.counts.failed) == (1, 1)


async def test_a_lease_ends() -> None:
    async with engine("kv_producer", lease_s=0.01) as p, engine("kv_consumer") as d:
        params = (await p.run(PROMPT, 1, keep_as="r-1")).transfer_params
        assert params is not None
        await asyncio.wait_for(p.released.wait(), 5)
        assert (p.pool.used_count, p.connector.counts.expired) == (0, 1)
        assert await d.connector.fetch(params, PROMPT) == 0


@pytest.mark.parametrize("change", ["prompt", "engine", "port"])
async def test_a_transfer_that_fails_is_recomputed_or_an_error(change: str) -> None:
    async with engine("kv_producer") as p, engine("kv_consumer") as d:
        params = (await p.run(PROMPT, 1, keep_as="r-1")).transfer_params
        assert params is not None
        prompt = PROMPT
        match change:
            case "prompt":
                prompt = [*PROMPT[:-1], 1]
            case "engine":
                params["remote_engine_id"] = "another"
            case "port":
                params["remote_port"] = 1
        assert await d.connector.fetch(params, prompt) == 0
        async with engine("kv_consumer", "fail") as strict:
            with pytest.raises(RequestError, match="Internal server error") as caught:
                await strict.connector.fetch(params, prompt)
            assert caught.value.status == 500
        assert p.pool.used_count == 4  # still kept for whom they are


@pytest.mark.parametrize(
    "name",
    ["remote_engine_id", "remote_request_id", "remote_block_ids", "remote_host", "remote_port"],
)
async def test_incomplete_parameters_are_refused(name: str) -> None:
    async with engine("kv_producer") as p, engine("kv_consumer") as d:
        params = (await p.run(PROMPT, 1, keep_as="r-1")).transfer_params
        assert params is not None
        with pytest.raises(RequestError, match=f"has no {name}") as caught:
            await d.connector.fetch({**params, name: None}, PROMPT)
        assert caught.value.status == 400


async def test_an_aborted_prefill_keeps_nothing() -> None:
    async with engine("kv_producer") as p:
        sequence = model.Sequence(PROMPT, [1], keep_as="r-1")
        p.engine.submit(sequence)
        p.engine.abort(sequence)
        await p.run(PROMPT, 1)
        assert p.pool.used_count == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "--kv-transfer-config"),
        ('{"kv_role": "kv_both"}', "kv_connector"),
        ('{"kv_connector": "LMCacheMP", "kv_role": "kv_both"}', "'LMCacheMP' is not simulated"),
        ('{"kv_connector": "NixlConnector", "kv_role": "x"}', "use one of kv_producer"),
        (
            '{"kv_connector":"NixlConnector","kv_role":"kv_both",'
            '"kv_connector_extra_config":{"kv_lease_duration":0}}',
            "kv_lease_duration must be",
        ),
    ],
)
def test_a_wrong_configuration_is_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TransferConfig.parse(text)


def test_vllms_other_fields_pass() -> None:
    config = TransferConfig.parse(
        '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'
    )
    assert (config.kv_load_failure_policy, config.lease_s) == ("fail", 30.0)
