"""One worker with the real engine: its stream, its drain, its death.

Slow to start (half a minute on two cores), so each test tells a whole story.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from dynamo_kv_router.keys import block_keys, model_seed
from dynamo_kv_router.stream.format import (
    Accepted,
    Cleared,
    Event,
    Finished,
    FirstToken,
    Load,
    Removed,
    Snapshot,
    Stored,
    WorkerInfo,
    unpack_keys,
)
from dynamo_kv_router.stream.subscriber import WorkerSubscriber

pytestmark = pytest.mark.timeout(600)

BLOCK = 32
START_S = 240.0
FLAGS = [
    *("--served-model-name", "tiny", "--enforce-eager", "--block-size", str(BLOCK)),
    *("--max-model-len", "4096", "--num-gpu-blocks-override", "256"),
]
LONG = " ".join(f"item {number} of the list" for number in range(40))


class Picker:
    """A picker's view of one worker, as plain as can be."""

    def __init__(self) -> None:
        self.info: WorkerInfo | None = None
        self.keys: set[int] = set()
        self.events: list[Event] = []  # all but keys and load
        self.load: Load | None = None
        self.lost: list[str] = []
        self.changed = asyncio.Event()

    def on_snapshot(self, worker: str, snapshot: Snapshot) -> None:
        self.info = snapshot.info
        self.load = snapshot.load
        self.keys = set(unpack_keys(snapshot.keys).tolist())
        self.changed.set()

    def on_events(self, worker: str, events: list[Event]) -> None:
        for event in events:
            match event:
                case Stored(keys):
                    self.keys.update(unpack_keys(keys).tolist())
                case Removed(keys):
                    self.keys.difference_update(unpack_keys(keys).tolist())
                case Cleared():
                    self.keys.clear()
                case Load():
                    self.load = event
                case _:
                    self.events.append(event)
        self.changed.set()

    def on_doubt(self, worker: str, reason: str) -> None:
        pass

    def on_lost(self, worker: str, reason: str) -> None:
        self.lost.append(reason)
        self.changed.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def finished(self, booking: str) -> Finished:
        def ends() -> list[Finished]:
            return [e for e in self.events if isinstance(e, Finished) and e.booking == booking]

        await self.until(lambda: bool(ends()))
        (end,) = ends()
        return end


@asynccontextmanager
async def picking(worker: Any) -> AsyncIterator[Picker]:
    picker = Picker()
    subscriber = WorkerSubscriber(worker.name, worker.stream, picker)
    await subscriber.start()
    try:
        yield picker
    finally:
        await subscriber.stop()


def group(leader: int) -> list[int]:
    """The living processes of a process group."""
    members = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, pgid = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgid) == leader and state not in "ZX":
                members.append(int(process.name))
    return members


async def status_of(client: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    async with client.get(url) as response:
        return response.status, await response.json()


async def chat(
    client: aiohttp.ClientSession, worker: Any, booking: str, content: str, **more: Any
) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **more}
    headers = {"x-dynamo-booking": booking}
    async with client.post(
        f"{worker.url}/v1/chat/completions", json=body, headers=headers
    ) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_its_stream_says_what_is_cached_and_its_drain_cuts_nothing(
    vllm_python: str, tiny_model: Path, start_worker: Callable[..., Any], tmp_path: Path
) -> None:
    worker = start_worker("vllm", ["--model", str(tiny_model), *FLAGS], TMPDIR=str(tmp_path))
    async with picking(worker) as picker, aiohttp.ClientSession() as client:
        await picker.until(lambda: picker.info is not None or not worker.running, START_S)
        assert worker.running, worker.output

        # what it is
        info = picker.info
        assert info is not None
        assert (info.model, info.block_size, info.total_blocks) == ("tiny", BLOCK, 256)
        assert (info.max_model_len, info.runtime, info.exact_events) == (4096, "vllm", True)
        await picker.until(lambda: picker.load is not None and picker.load.pickers == 1)
        async with asyncio.timeout(10):
            while True:  # ready as soon as the picker has subscribed
                status, ready = await status_of(client, f"{worker.status_url}/ready")
                if status == 200:
                    break
                await asyncio.sleep(0.05)
        assert ready["reason"] == ""
        for name, digest in info.tokenizer.items():
            async with client.get(f"{worker.status_url}/tokenizer/{name}") as response:
                content = await response.read()
            assert hashlib.sha256(content).hexdigest() == digest
            assert content == (tiny_model / name).read_bytes()
        assert "tokenizer.json" in info.tokenizer
        assert "model.safetensors" not in info.tokenizer

        # what is cached
        body = {"model": "tiny", "messages": [{"role": "user", "content": LONG}]}
        async with client.post(f"{worker.url}/tokenize", json=body) as response:
            tokens = (await response.json())["tokens"]
        expected = block_keys(np.array(tokens), BLOCK, seed=model_seed("tiny")).tolist()
        assert len(expected) >= 4
        hint = f"tokens={len(tokens)};cached=0"
        first = await chat(client, worker, f"p-1;{hint}", LONG, max_tokens=2, temperature=0)
        end = await picker.finished("p-1")
        assert end.prompt_tokens == first["usage"]["prompt_tokens"] == len(tokens)
        assert (end.cached_tokens, end.completion_tokens, end.status) == (0, 2, 200)
        await picker.until(lambda: picker.keys >= set(expected))
        assert len(picker.keys) == len(expected)

        second = await chat(client, worker, f"p-2;{hint}", LONG, max_tokens=2, temperature=0)
        end = await picker.finished("p-2")
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert end.cached_tokens == cached == (len(tokens) - 1) // BLOCK * BLOCK
        assert picker.events[0] == Accepted("p-1", len(tokens), 0)

        # a long stream, and SIGTERM in the middle of it
        body |= {"stream": True, "max_tokens": 600, "ignore_eos": True}
        body |= {"stream_options": {"include_usage": True}}
        url = f"{worker.url}/v1/chat/completions"
        headers = {"x-dynamo-booking": f"p-3;{hint}"}
        async with client.post(url, json=body, headers=headers) as response:
            assert response.status == 200
            lines = response.content
            await lines.readline()
            await picker.until(lambda: FirstToken("p-3") in picker.events)
            worker.terminate()
            terminated = time.monotonic()
            await picker.until(lambda: picker.load is not None and picker.load.draining)
            assert (await status_of(client, f"{worker.status_url}/ready"))[0] == 503
            rest = (await lines.read()).decode()
        assert rest.endswith("data: [DONE]\n\n")
        last = json.loads(rest.strip().split("\n\n")[-2].removeprefix("data: "))
        assert last["usage"]["completion_tokens"] == 600
        assert (await picker.finished("p-3")).completion_tokens == 600
        streamed = time.monotonic() - terminated
        assert streamed > 0.2, "the stream was over before the drain began: nothing was shown"

    assert await worker.ended() == 0
    left = list(tmp_path.rglob("dyn-*"))
    assert left == []


async def test_when_its_engine_dies_it_dies_with_the_engines_status(
    vllm_python: str, tiny_model: Path, start_worker: Callable[..., Any]
) -> None:
    worker = start_worker("vllm", ["--model", str(tiny_model), *FLAGS])
    async with picking(worker) as picker:
        await picker.until(lambda: picker.info is not None or not worker.running, START_S)
        assert worker.running, worker.output
        engine = worker.engine_pid()
        family = group(engine)
        assert len(family) > 1, "vLLM's core is a process of its own"
        os.kill(engine, signal.SIGKILL)
        assert await worker.ended() == 128 + signal.SIGKILL
        assert "the engine was killed by signal 9; its last lines" in worker.output
        assert group(engine) == []
        await picker.until(lambda: bool(picker.lost), 10.0)
