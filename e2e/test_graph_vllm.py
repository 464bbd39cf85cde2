"""Graphs with real engines: conversations stay where their prefix is, and failures stay unseen.

Two graphs run one after the other: workers under our launcher, and stock vLLM servers. Starting one
takes about a minute on two cores, so the tests of a class share one graph and run in their order;
each makes conversations of its own.

What a decision should have been is never taken from the platform: a ledger here notes which tokens
each engine has computed, in the engines' own words, and tells from that what each of them caches.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

pytestmark = pytest.mark.timeout(600)

EXAMPLES = Path(__file__).parent.parent / "examples"
BLOCK = 32  # tokens, as the graphs set it
RESTART_S = 240.0
EVENTS_S = 10.0
"""For what should take milliseconds, on a machine that does much else."""
TRICKLE_S = 0.3

Json = dict[str, Any]


@dataclass
class Answer:
    """One request from the client's side, and what the frontend says of it."""

    request_id: str
    sent: float  # monotonic seconds
    status: int = 0
    error: str = ""
    """Why it is no complete answer; "" if it is one."""
    text: str = ""
    prompt: list[int] = field(default_factory=list)  # token ids, as the engine counts them
    output: list[int] = field(default_factory=list)
    usage: Json = field(default_factory=dict)
    ended: float = 0.0

    @property
    def cached(self) -> int:
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


class Ledger:
    """What each engine has computed since it started, and so caches: nothing is evicted here."""

    def __init__(self) -> None:
        self._computed: dict[str, list[list[int]]] = {}

    def note(self, worker: str, answer: Answer) -> None:
        # The last token was sampled but never fed back.
        self._computed.setdefault(worker, []).append([*answer.prompt, *answer.output[:-1]])

    def forget(self, worker: str) -> None:
        self._computed.pop(worker, None)

    def overlap(self, worker: str, tokens: Sequence[int]) -> int:
        """Leading full blocks of ``tokens`` that ``worker`` caches."""
        return max(
            (shared(tokens, one) // BLOCK for one in self._computed.get(worker, ())), default=0
        )

    def blocks(self, worker: str) -> int:
        """How many different blocks ``worker`` caches."""
        return len({
            tuple(one[:end])
            for one in self._computed.get(worker, ())
            for end in range(BLOCK, len(one) + 1, BLOCK)
        })  # fmt: skip


def shared(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Graph:
    """A client of a running graph that keeps the ledger."""

    def __init__(self, up: Any, ledger: Ledger, client: aiohttp.ClientSession) -> None:
        self.up = up
        self.ledger = ledger
        self._client = client
        (frontend,) = up.pods("frontend").values()
        self._status = f"http://{frontend.address}:{frontend.status_port}"

    async def send(self, messages: list[Json], *, stream: bool = False, **more: Any) -> Answer:
        """One chat request. Nothing is raised: what went wrong is in the answer."""
        answer = Answer(str(uuid.uuid4()), time.monotonic())
        body: Json = {"model": "tiny", "messages": messages, "temperature": 0} | more
        body |= {"return_token_ids": True, "stream": stream, "ignore_eos": True}
        if stream:
            body["stream_options"] = {"include_usage": True}
        try:
            async with self._client.post(
                f"{self.up.url}/v1/chat/completions",
                json=body,
                headers={"x-request-id": answer.request_id},
            ) as response:
                answer.status = response.status
                raw = await response.text()
            if answer.status != 200:
                answer.error = raw
            else:
                read_answer(answer, raw, stream)
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            answer.error = repr(error)
        answer.ended = time.monotonic()
        if not answer.error and answer.usage.get("completion_tokens") != more.get("max_tokens"):
            answer.error = f"cut: {answer.usage}"
        return answer

    @asynccontextmanager
    async def stream(
        self, messages: list[Json], *, max_tokens: int
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """The body of a streamed answer of exactly ``max_tokens`` tokens, as it comes."""
        body: Json = {"model": "tiny", "messages": messages, "max_tokens": max_tokens}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        async with self._client.post(f"{self.up.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            yield response.content

    async def newest(self) -> Json:
        """The journal's last decision for a stream that is not one of the trickle's."""
        found = (await self._get("/debug/decisions"))["decisions"]
        return next(dict(one) for one in found if one["stream"] and one["prompt_tokens"] >= 100)

    async def _get(self, path: str) -> Any:
        async with self._client.get(self._status + path) as response:
            return await response.json()

    async def decision(self, answer: Answer) -> Json:
        """The journal's entry, with the outcome that the proxy logged."""
        async with asyncio.timeout(EVENTS_S):
            while True:
                found = (await self._get(f"/debug/decisions?request_id={answer.request_id}"))[
                    "decisions"
                ]
                if found and "status" in found[0]["outcome"]:
                    return dict(found[0])
                await asyncio.sleep(0.02)

    async def served(self, answer: Answer) -> str:
        """The worker that the proxy had the answer from."""
        upstream = (await self.decision(answer))["outcome"]["upstream"]
        workers = {f"{pod.address}:{pod.port}": name for name, pod in self.workers().items()}
        return workers[upstream]

    async def settled(self) -> None:
        """Until the picker knows what every worker caches, as the ledger has it."""
        states: list[Json] = []
        try:
            async with asyncio.timeout(EVENTS_S):
                while True:
                    states = (await self._get("/debug/workers"))["workers"]
                    if all(
                        state["cached_blocks"] == self.ledger.blocks(state["name"])
                        and state["active_requests"] == 0
                        for state in states
                    ):
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            wanted = {state["name"]: self.ledger.blocks(state["name"]) for state in states}
            pytest.fail(f"cached blocks should be {wanted}, the picker has {states}")

    async def until_exact(self, worker: str) -> None:
        """Until ``worker`` can be chosen and its cache is known in full."""
        async with asyncio.timeout(EVENTS_S):
            while True:
                states = (await self._get("/debug/workers"))["workers"]
                if [s for s in states if s["name"] == worker and s["state"] == "exact"]:
                    return
                await asyncio.sleep(0.05)

    async def tokenize(self, messages: list[Json]) -> list[int]:
        """A prompt's tokens, from an engine itself."""
        worker = next(pod for pod in self.workers().values() if pod.ready)
        async with self._client.post(
            f"http://{worker.address}:{worker.port}/tokenize",
            json={"model": "tiny", "messages": messages},
        ) as response:
            return list((await response.json())["tokens"])

    def workers(self) -> dict[str, Any]:
        return dict(self.up.pods("worker"))

    async def until_ready(self) -> None:
        await until(self.up.ready, RESTART_S)

    def hello(self, number: int) -> asyncio.Task[Answer]:
        """Send a request that is shorter than a block: it leaves no trace in a cache."""
        message = {"role": "user", "content": f"Hello {number}"}
        request = self.send([message], stream=number % 2 == 1, max_tokens=4)
        return asyncio.create_task(request)

    @asynccontextmanager
    async def trickle(self) -> AsyncIterator[list[asyncio.Task[Answer]]]:
        """Short requests, one after the other, every second one streamed; all have ended after."""
        sent: list[asyncio.Task[Answer]] = []

        async def flow() -> None:
            for number in itertools.count():
                sent.append(self.hello(number))
                await asyncio.sleep(TRICKLE_S)

        flowing = asyncio.create_task(flow())
        try:
            yield sent
        finally:
            flowing.cancel()
            await asyncio.gather(flowing, return_exceptions=True)
            await asyncio.gather(*sent)


def read_answer(answer: Answer, raw: str, stream: bool) -> None:
    """Take the body of an answer apart; a body that is not complete is an error."""
    if not stream:
        body = json.loads(raw)
        (choice,) = body["choices"]
        answer.prompt, answer.output = body["prompt_token_ids"], choice["token_ids"]
        answer.text, answer.usage = choice["message"]["content"] or "", body["usage"]
        return
    events = [part.removeprefix("data: ") for part in raw.split("\n\n") if part]
    if not raw.endswith("\n\n") or events[-1] != "[DONE]":
        answer.error = f"cut: {raw[-200:]}"
        return
    for chunk in map(json.loads, events[:-1]):
        answer.prompt = chunk.get("prompt_token_ids") or answer.prompt
        answer.usage = chunk.get("usage") or answer.usage
        for choice in chunk["choices"]:
            answer.output += choice.get("token_ids") or []
            answer.text += choice["delta"].get("content") or ""


class Conversation:
    """Turns that are checked one by one against the ledger."""

    def __init__(self, graph: Graph, topic: str) -> None:
        self._graph = graph
        self.messages: list[Json] = []
        self._said = (
            f"In this conversation about {topic} ({uuid.uuid4()}) the first message is long: "
            + " ".join(f"item {number} of the list" for number in range(30))
        )

    async def turn(self, *, settled: bool = True) -> tuple[str, Answer, Json]:
        """One more turn: (worker that served it, answer, decision), all of it checked."""
        graph = self._graph
        self.messages.append({"role": "user", "content": self._said})
        self._said = "And what comes after that?"
        tokens = await graph.tokenize(self.messages)
        assert len(tokens) >= 100
        wanted = {name: graph.ledger.overlap(name, tokens) for name in graph.workers()}
        if settled:
            await graph.settled()
        answer = await graph.send(self.messages, max_tokens=8)
        assert (answer.status, answer.error) == (200, "")
        self.messages.append({"role": "assistant", "content": answer.text})
        assert answer.prompt == tokens
        assert answer.usage["prompt_tokens"] == len(tokens)

        decision = await graph.decision(answer)
        assert (decision["how"], decision["reason"]) == ("exact", "")
        assert decision["prompt_tokens"] == len(tokens)
        assert decision["block_size"] == BLOCK
        overlaps = {one["name"]: one["overlap_blocks"] for one in decision["candidates"]}
        assert overlaps == wanted
        worker = await graph.served(answer)
        assert worker == decision["candidates"][0]["name"]
        # The engine's own word. It computes the last token itself, cached or not.
        assert answer.cached == min(wanted[worker], (len(tokens) - 1) // BLOCK) * BLOCK
        graph.ledger.note(worker, answer)
        return worker, answer, decision


async def check_that_conversations_stay(graph: Graph) -> None:
    """Each turn goes to the worker of the turns before; another conversation to the other one."""
    conversations = [Conversation(graph, topic) for topic in ("blocks", "routes")]
    homes = [(await conversation.turn())[0] for conversation in conversations]
    assert sorted(homes) == sorted(graph.workers())
    for _ in range(2):
        for conversation, home in zip(conversations, homes, strict=True):
            worker, answer, decision = await conversation.turn()
            assert worker == home
            assert decision["candidates"][0]["overlap_blocks"] >= 3
            assert answer.cached >= 96


async def check_that_a_killed_worker_goes_unseen(graph: Graph) -> None:
    """SIGKILL to a pod under load: later requests are answered, and the pod comes back."""
    conversation = Conversation(graph, "kills")
    victim, _, _ = await conversation.turn()
    await Conversation(graph, "survivors").turn()  # no worker's cache is empty
    pod = graph.workers()[victim]
    async with graph.trickle() as sent:
        await until(lambda: sum(task.done() for task in sent) >= 6, EVENTS_S + 20)
        async with graph.stream(conversation.messages, max_tokens=1500) as lines:
            await lines.readline()
            assert (await graph.newest())["candidates"][0]["name"] == victim
            os.kill(pod.pid, signal.SIGKILL)
            killed = time.monotonic()
            # Many at once, while the kernel is still taking the process apart.
            sent += [graph.hello(number) for number in range(20)]
            # What runs on it is lost, and the client hears of it at once.
            async with asyncio.timeout(EVENTS_S):
                with pytest.raises(aiohttp.ClientPayloadError):
                    await lines.read()
        await until(lambda: not listens(pod.address, pod.port), EVENTS_S)
        await until(lambda: not graph.up.ready(), EVENTS_S)
        await graph.until_ready()
        assert graph.workers()[victim].pid not in (pod.pid, None)
        back = time.monotonic()
        async with asyncio.timeout(EVENTS_S + 20):  # the restarted worker is used
            for number in itertools.count(len(sent)):
                await until(lambda number=number: len(sent) > number, EVENTS_S)
                answer = await sent[number]
                if answer.error or await graph.served(answer) == victim:
                    break
    answers = [task.result() for task in sent]
    before = [answer for answer in answers if answer.ended < killed]
    during = [answer for answer in answers if answer.sent < killed <= answer.ended]
    after = [answer for answer in answers if answer.sent >= killed]
    assert [a for a in [*before, *after] if a.status != 200 or a.error] == []
    # What ran on the killed worker may be lost, and nothing else.
    lost = [answer for answer in during if answer.error]
    assert [await graph.served(answer) for answer in lost] == [victim] * len(lost)
    down = [answer for answer in after if answer.sent < back]
    print(
        f"killed {victim}: {len(before)} requests before, {len(during)} running "
        f"({len(lost)} lost), {len(down)} while it was down, {len(after) - len(down)} after"
    )
    assert len(down) >= 5

    assert max(len(answer.prompt) + len(answer.output) for answer in [*before, *after]) < BLOCK
    graph.ledger.forget(victim)
    await graph.until_exact(victim)
    # Its cache went with it, and the picker knows. So it has the emptiest cache, and a
    # conversation that nobody knows is its own, and stays.
    worker, answer, decision = await conversation.turn()
    assert {c["overlap_blocks"] for c in decision["candidates"]} == {0}
    assert (worker, answer.cached) == (victim, 0)
    worker, answer, _ = await conversation.turn()
    assert worker == victim
    assert answer.cached >= 96


def listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address, port)) == 0


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Poll for what happens in other processes."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield session


@pytest.fixture(scope="class")
def running(request: pytest.FixtureRequest, start_up: Callable[[Path], Any]) -> tuple[Any, Ledger]:
    """The graph of the class's file, ready, and what its engines have computed."""
    return start_up(request.cls.FILE), Ledger()


@pytest.fixture
def graph(running: tuple[Any, Ledger], client: aiohttp.ClientSession) -> Graph:
    return Graph(*running, client)


class TestOurWorkers:
    FILE = EXAMPLES / "vllm-cpu.yaml"

    async def test_conversations_stay_with_their_worker(self, graph: Graph) -> None:
        await check_that_conversations_stay(graph)

    async def test_a_restarted_frontend_knows_every_cache_at_once(self, graph: Graph) -> None:
        conversation = Conversation(graph, "snapshots")
        home, _, _ = await conversation.turn()
        await graph.settled()
        (frontend,) = graph.up.pods("frontend").values()
        os.kill(frontend.pid, signal.SIGKILL)
        await until(lambda: not graph.up.ready(), EVENTS_S)
        await graph.until_ready()
        assert graph.up.pods("frontend")[frontend.name].pid != frontend.pid
        # The very first request, and nobody has waited for caches to be known.
        worker, answer, decision = await conversation.turn(settled=False)
        assert worker == home
        assert answer.cached >= 96
        assert (await graph._get("/debug/decisions"))["decisions"] == [decision]
        await graph.settled()

    async def test_a_killed_worker_goes_unseen_and_comes_back(self, graph: Graph) -> None:
        await check_that_a_killed_worker_goes_unseen(graph)

    async def test_the_end_lets_a_long_answer_finish_and_leaves_nothing(self, graph: Graph) -> None:
        pods = {**graph.workers(), **graph.up.pods("frontend")}
        story = [{"role": "user", "content": "Tell me a long story."}]
        async with graph.stream(story, max_tokens=800) as lines:
            await lines.readline()
            graph.up.interrupt()
            interrupted = time.monotonic()
            rest = (await lines.read()).decode()
        lasted = time.monotonic() - interrupted
        assert rest.endswith("data: [DONE]\n\n"), rest[-500:]
        chunks = [json.loads(one[6:]) for one in rest.strip().split("\n\n")[:-1] if "{" in one]
        assert chunks[-1]["usage"]["completion_tokens"] == 800
        assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] == "length"
        print(f"the stream went on for {lasted:.1f} s")
        assert lasted > 0.5, "the stream was over before the end began: nothing was shown"
        assert await asyncio.to_thread(graph.up.ended) == 0
        assert graph.up.leftovers() == []
        for pod in pods.values():
            assert not listens(pod.address, pod.port)


class TestStockServers:
    FILE = EXAMPLES / "vllm-stock.yaml"

    async def test_conversations_stay_with_their_worker(self, graph: Graph) -> None:
        await check_that_conversations_stay(graph)

    async def test_a_killed_worker_goes_unseen_and_comes_back(self, graph: Graph) -> None:
        await check_that_a_killed_worker_goes_unseen(graph)

    async def test_killing_the_runner_leaves_nothing(self, graph: Graph) -> None:
        # Each engine has a process of its own beside the one that the runner started.
        assert sum("EngineCore" in line for line in graph.up.processes().values()) == 2
        graph.up.kill()
        await until(lambda: graph.up.leftovers() == [], EVENTS_S)
