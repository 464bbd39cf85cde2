"""A worker's whole life with the simulated engine, each part of it a real process.

What is specific to the real engine is in e2e/test_vllm_worker.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from dynamo_kv_router.keys import block_keys, model_seed
from dynamo_kv_router.stream.format import (
    Accepted,
    Cleared,
    Event,
    Finished,
    FirstToken,
    Info,
    Load,
    Removed,
    Snapshot,
    Stored,
    WorkerInfo,
    unpack_keys,
)
from dynamo_kv_router.stream.subscriber import WorkerSubscriber
from dynamo_runtime.child import Child
from dynamo_workers.tiny import TOKENIZER_FOLDER

BLOCK = 16
FLAGS = ["--served-model-name", "tiny", "--block-size", str(BLOCK)]
FLAGS += ["--num-gpu-blocks-override", "512", "--max-model-len", "4096"]
LONG = " ".join(f"item {number} of the list" for number in range(30))


class View:
    """What a picker knows of one worker, as plain as can be."""

    def __init__(self) -> None:
        self.info: WorkerInfo | None = None
        self.keys: set[int] = set()
        self.load = Load()
        self.requests: list[Accepted | FirstToken | Finished] = []
        self.in_flight: set[str] = set()
        self.lost: list[str] = []
        self._changed = asyncio.Event()

    def on_snapshot(self, worker: str, snapshot: Snapshot) -> None:
        self.info = snapshot.info
        self.load = snapshot.load
        self.keys = set(unpack_keys(snapshot.keys).tolist())
        self.in_flight = {flight.booking for flight in snapshot.bookings}
        self._changed.set()

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
                case Info(info):
                    self.info = info
                case Accepted() | FirstToken() | Finished():
                    self.requests.append(event)
        self._changed.set()

    def on_doubt(self, worker: str, reason: str) -> None:
        pass

    def on_lost(self, worker: str, reason: str) -> None:
        self.lost.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def finished(self, booking: str) -> Finished:
        def ends() -> list[Finished]:
            return [e for e in self.requests if isinstance(e, Finished) and e.booking == booking]

        await self.until(ends)
        (end,) = ends()
        return end


class Pod:
    """A worker's process on an address of its own."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address = address
        self.folder = folder  # its TMPDIR
        self.name = f"pod-{address}"
        self.url = f"http://{address}:8000"
        self.status_url = f"http://{address}:9090"
        self.lines: list[str] = []
        self.child: Child
        self.client: aiohttp.ClientSession
        self._spoke = asyncio.Event()

    async def start(self, arguments: list[str], env: dict[str, str]) -> None:
        self.child = await Child.start(
            [sys.executable, "-m", "dynamo_workers.worker", "sim", *arguments],
            env={
                **os.environ,
                "POD_NAME": self.name,
                "DYN_HTTP_HOST": self.address,
                "DYN_SYSTEM_HOST": self.address,
                "DYN_DRAIN_QUIET_SECONDS": "0.1",
                "TMPDIR": str(self.folder),
                **env,
            },
            on_line=self._line,
        )

    def _line(self, line: str) -> None:
        self.lines.append(line)
        self._spoke.set()

    async def said(self, text: str) -> None:
        async with asyncio.timeout(20):
            while not any(text in line for line in self.lines):
                self._spoke.clear()
                await self._spoke.wait()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def children(self) -> dict[int, str]:
        """The launcher's child processes, zombies included: pid -> command line."""
        pids = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        return {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}

    def engine_pid(self) -> int:
        (pid,) = [pid for pid, line in self.children().items() if "dynamo_workers.sim" in line]
        return pid

    async def ended(self) -> int:
        return await asyncio.wait_for(self.child.wait(), 30)

    async def status(self, path: str) -> tuple[int, Any]:
        async with self.client.get(f"{self.status_url}{path}") as response:
            return response.status, await response.json()

    async def ready(self) -> bool:
        try:
            return (await self.status("/ready"))[0] == 200
        except aiohttp.ClientConnectorError:
            return False  # its status server is not up yet

    async def until_ready(self) -> Any:
        await eventually(self.ready)
        return (await self.status("/ready"))[1]

    async def metric(self, name: str) -> float:
        async with self.client.get(f"{self.status_url}/metrics") as response:
            for line in (await response.text()).splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise AssertionError(f"no metric {name}")

    async def chat(self, booking: str, content: str = LONG, **more: Any) -> Any:
        async with self.post(booking, content, **more) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    def post(self, booking: str, content: str = LONG, **more: Any) -> Any:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **more}
        headers = {"x-dynamo-booking": booking}
        return self.client.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)


def free_address() -> str:
    """A loopback address on which every port of a pod is free."""
    while True:
        octets = (random.randrange(64, 255), random.randrange(256), random.randrange(1, 255))
        address = "127." + ".".join(map(str, octets))
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in (8000, 9090, 5557):
                held.enter_context(socket.socket()).bind((address, port))
            return address


async def eventually(check: Callable[[], Awaitable[object]], timeout_s: float = 15.0) -> None:
    """Poll what can't be awaited: another process's status page."""
    async with asyncio.timeout(timeout_s):
        while True:
            if await check():
                return
            await asyncio.sleep(0.03)


StartPod = Callable[..., Awaitable[Pod]]
Watch = Callable[[Pod], Awaitable[View]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartPod]:
    """``await start(*flags, **env) -> Pod``; every pod ends with the test."""
    pods: list[Pod] = []

    async def start_pod(*arguments: str, **env: str) -> Pod:
        pod = Pod(free_address(), tmp_path)
        pods.append(pod)
        pod.client = aiohttp.ClientSession()
        await pod.start([*FLAGS, *arguments], env)
        return pod

    yield start_pod
    for pod in pods:
        await pod.client.close()
        await pod.child.stop(10.0)
        print(f"--- {pod.name}", *pod.lines[-60:], sep="\n")


@pytest.fixture
async def watch() -> AsyncIterator[Watch]:
    """``await watch(pod) -> View``: subscribes as a picker and waits for the snapshot."""
    subscribers: list[WorkerSubscriber] = []

    async def subscribe(pod: Pod) -> View:
        view = View()
        subscriber = WorkerSubscriber(pod.name, f"tcp://{pod.address}:5557", view)
        subscribers.append(subscriber)
        await subscriber.start()
        await view.until(lambda: view.info is not None)
        return view

    yield subscribe
    for subscriber in subscribers:
        await subscriber.stop()


ORPHAN_MAKER = """
import subprocess

subprocess.run(["sh", "-c", "sleep 0.1 & exit"], check=True)  # the sleeper loses its parent


class Nothing:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)
"""


async def test_what_pickers_learn_of_a_worker(
    start: StartPod, watch: Watch, tmp_path: Path
) -> None:
    (tmp_path / "orphan_maker.py").write_text(ORPHAN_MAKER)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    pod = await start(
        *("--speed", "50", "--chat-template-content-format", "string"),
        *("--middleware", "orphan_maker.Nothing"),
        PYTHONPATH=path,
    )
    view = await watch(pod)
    assert (await pod.until_ready())["reason"] == ""

    # what it is
    info = view.info
    assert info is not None
    assert (info.worker, info.model, info.block_size) == (pod.name, "tiny", BLOCK)
    assert (info.total_blocks, info.max_model_len, info.runtime) == (512, 4096, "sim")
    assert info.exact_events
    assert info.tokenizer_settings == {"chat_template_content_format": "string"}
    status, described = await pod.status("/worker")
    assert (status, described["tokenizer"]) == (200, info.tokenizer)
    async with pod.client.get(f"{pod.status_url}/metrics") as response:
        page = await response.text()
    assert "dynamo_worker_pickers 1.0" in page
    assert "vllm:num_requests_running{" in page  # the engine's own, passed on

    # its tokenizer, and nothing else
    assert {"tokenizer.json", "tokenizer_config.json"} <= info.tokenizer.keys()
    for name, digest in info.tokenizer.items():
        async with pod.client.get(f"{pod.status_url}/tokenizer/{name}") as response:
            content = await response.read()
        assert content == (TOKENIZER_FOLDER / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    for name in ("__init__.py", "..%2F__init__.py", "%2Fetc%2Fpasswd", ""):
        async with pod.client.get(f"{pod.status_url}/tokenizer/{name}") as response:
            assert response.status == 404

    # what is cached and what runs
    body = {"model": "tiny", "messages": [{"role": "user", "content": LONG}]}
    async with pod.client.post(f"{pod.url}/tokenize", json=body) as response:
        tokens = (await response.json())["tokens"]
    expected = set(block_keys(tokens, BLOCK, seed=model_seed("tiny")).tolist())
    assert len(expected) >= 4
    hint = f"tokens={len(tokens)};cached=0"
    await pod.chat(f"p-1;{hint}", max_tokens=1)
    assert await view.finished("p-1") == Finished("p-1", len(tokens), 0, 1, 200)
    await view.until(lambda: view.keys >= expected)
    assert view.keys == expected
    answer = await pod.chat(f"p-2;{hint}", max_tokens=1)
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert (await view.finished("p-2")).cached_tokens == cached > 0
    assert view.requests[0] == Accepted("p-1", len(tokens), 0)
    async with pod.post(f"p-3;{hint}", max_tokens=3, stream=True) as response:
        await response.read()
    end = await view.finished("p-3")
    assert (end.prompt_tokens, end.completion_tokens) == (-1, -1)  # the client asked for no usage
    assert view.requests[-3:] == [Accepted("p-3", len(tokens), 0), FirstToken("p-3"), end]

    # A picker that comes later is as warm at once; ready outlasts its going.
    late = View()
    subscriber = WorkerSubscriber(pod.name, f"tcp://{pod.address}:5557", late)
    await subscriber.start()
    await late.until(lambda: late.info is not None)
    assert late.keys == view.keys >= expected
    await view.until(lambda: view.load.pickers == 2)
    await subscriber.stop()
    await view.until(lambda: view.load.pickers == 1)
    assert await pod.ready()
    assert await pod.metric("dynamo_worker_pickers") == 1
    assert await pod.metric("dynamo_worker_requests_total") == 3

    # A process of the engine's whose parent has ended is the launcher's to bury.
    async def buried() -> bool:
        return await pod.metric("dynamo_worker_orphans_reaped_total") == 1

    await eventually(buried)
    assert len(pod.children()) == 2  # the engine and the guard

    # The engine's death is the worker's.
    os.kill(pod.engine_pid(), signal.SIGKILL)
    assert await pod.ended() == 128 + signal.SIGKILL
    assert "the engine was killed by signal 9" in pod.output
    await view.until(lambda: view.lost)
    assert list(pod.folder.glob("dyn-*")) == []


async def test_it_waits_for_a_picker_and_its_stop_lets_streams_finish(
    start: StartPod, watch: Watch
) -> None:
    pod = await start(DYN_READY_WITHOUT_PICKER_SECONDS="1")
    await pod.said("waiting for a picker to subscribe")
    status, answer = await pod.status("/ready")
    assert (status, answer["ready"]) == (503, False)
    assert answer["reason"].startswith("waiting for a picker")
    assert (await pod.until_ready())["reason"] == (
        "no picker subscribed within 1 s; open without one"
    )
    assert await pod.metric("dynamo_worker_ready_without_picker") == 1
    assert any("WARNING" in line and "no picker" in line for line in pod.lines)

    view = await watch(pod)
    more = {"max_tokens": 60, "ignore_eos": True, "stream": True}
    async with pod.post("p-1;tokens=9;cached=0", "hi", **more) as response:
        await response.content.readline()
        await view.until(lambda: FirstToken("p-1") in view.requests)
        pod.child.send_signal(signal.SIGTERM)
        await view.until(lambda: view.load.draining)
        status, answer = await pod.status("/ready")
        assert (status, answer["phase"]) == (503, "draining")
        assert view.requests == [Accepted("p-1", 9, 0), FirstToken("p-1")], "it ended too early"
        text = (await response.read()).decode()
    assert text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in text.replace(" ", "")
    assert (await view.finished("p-1")).status == 200
    assert await pod.ended() == 0
    assert list(pod.folder.glob("dyn-*")) == []


async def test_an_engine_that_hangs_for_long_is_killed(start: StartPod) -> None:
    """What waits in it is cut, so that whoever sent it can send it elsewhere."""
    pod = await start(
        DYN_HEALTH_TIMEOUT_SECONDS="0.2", DYN_HUNG_SECONDS="1", DYN_READY_WITHOUT_PICKER_SECONDS="0"
    )
    await pod.until_ready()
    asking = asyncio.create_task(pod.chat("p-1;tokens=500;cached=0", max_tokens=2000))
    os.kill(pod.engine_pid(), signal.SIGSTOP)
    await pod.said("it hangs: no answer to a check for 1 s")
    assert await pod.ended() == 1
    with pytest.raises(aiohttp.ClientError):
        await asking


async def test_a_slow_engine_a_frozen_one_and_a_drain_that_takes_too_long(
    start: StartPod, watch: Watch
) -> None:
    pod = await start(
        *("--speed", "0.3"),
        DYN_HEALTH_TIMEOUT_SECONDS="0.3",
        DYN_DRAIN_SECONDS="0.5",
        DYN_STOP_SECONDS="2",
    )
    view = await watch(pod)
    await pod.until_ready()

    # Unstreamed, yet known to decode: the engine counts first tokens.
    more = {"max_tokens": 2000, "ignore_eos": True}
    asking = asyncio.create_task(pod.chat("p-1;tokens=500;cached=0", **more))
    await view.until(lambda: FirstToken("p-1") in view.requests)
    await view.until(lambda: view.load.active_requests == 1)
    assert view.load.active_prefill_tokens == 0
    assert not asking.done()
    asking.cancel()
    assert (await view.finished("p-1")).status == 499
    await asyncio.gather(asking, return_exceptions=True)

    engine = pod.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    try:

        async def unready() -> bool:
            return not await pod.ready()

        await eventually(unready)
        assert "has not answered" in (await pod.status("/ready"))[1]["reason"]
    finally:
        os.kill(engine, signal.SIGCONT)
    await pod.until_ready()

    async with pod.post("p-2", "hi", stream=True, **more) as response:
        await response.content.readline()
        pod.child.send_signal(signal.SIGTERM)
        with contextlib.suppress(aiohttp.ClientError):
            await response.read()
    assert await pod.ended() == 1
    await pod.said("1 requests still run after 0.5 s: cutting them")
    assert not Path(f"/proc/{engine}").exists()


HELPER = """
import subprocess

subprocess.Popen(["sleep", "1000"])  # outlives the engine's process, as vLLM's core would


class Nothing:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)
"""


@pytest.mark.parametrize("how", ["a second signal", "killed"])
async def test_nothing_survives_a_launcher_that_is_forced_to_end(
    start: StartPod, watch: Watch, tmp_path: Path, how: str
) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    pod = await start("--speed", "0.1", "--middleware", "helper.Nothing", PYTHONPATH=path)
    await watch(pod)
    engine = pod.engine_pid()
    (helper,) = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
    more = {"max_tokens": 2000, "ignore_eos": True, "stream": True}
    async with pod.post("p-1", "hi", **more) as response:
        await response.content.readline()
        if how == "killed":
            pod.child.send_signal(signal.SIGKILL)
            assert await pod.ended() == -signal.SIGKILL
        else:
            pod.child.send_signal(signal.SIGTERM)
            await pod.said("draining: ")
            await asyncio.sleep(0.6)  # two signals within 0.5 s are one request
            pod.child.send_signal(signal.SIGTERM)
            assert await pod.ended() == 128 + signal.SIGTERM

    async def gone() -> bool:
        left = [Path(f"/proc/{pid}") for pid in (engine, helper)]
        return not any(path.exists() for path in left) and not list(pod.folder.glob("dyn-*"))

    await eventually(gone)


async def test_a_stop_before_the_engine_is_up_is_quick(start: StartPod) -> None:
    pod = await start()
    await pod.said("starting the engine")
    pod.child.send_signal(signal.SIGTERM)
    assert await pod.ended() == 0
    assert list(pod.folder.glob("dyn-*")) == []


async def test_an_engine_that_cannot_start_shows_its_last_words(start: StartPod) -> None:
    pod = await start("--block-size", "0")
    assert await pod.ended() == 2
    assert "the engine exited with status 2; its last lines" in pod.output


async def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    async def refused(port: int) -> None:
        pod = Pod(free_address(), tmp_path)
        with socket.socket() as taken:
            taken.bind((pod.address, port))
            taken.listen()
            await pod.start(FLAGS, {})
            assert await pod.ended() == 1
        assert f"{pod.address}:{port}" in pod.output
        assert "Traceback" not in pod.output

    await asyncio.gather(*map(refused, (8000, 9090, 5557)))
