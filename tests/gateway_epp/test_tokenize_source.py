"""Tokenizers from workers over HTTP, and tokens from engines that serve none."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from dynamo_epp.requests import ChatPrompt, Encoding, TextPrompts, TokenPrompts
from dynamo_epp.tokenize import (
    NotExact,
    RemoteTokenizer,
    TokenizerSource,
    TokenizeThreads,
    fingerprint,
)
from dynamo_workers.tiny import TOKENIZER_FILES, TOKENIZER_FOLDER

FILES = {name: (TOKENIZER_FOLDER / name).read_bytes() for name in TOKENIZER_FILES}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
PROMPT = ChatPrompt(messages=[{"role": "user", "content": "hi", "reasoning_content": "r"}])


class Pod:
    """A worker's status server, and an engine's /tokenize."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.fetched: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.answer = web.Response
        self.reply: dict[str, Any] = {"tokens": [1, 2, 3], "count": 3, "max_model_len": 9}
        self.status = 200
        self.url = ""

    async def file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.fetched.append(name)
        if name not in self.files:
            raise web.HTTPNotFound
        return web.Response(body=self.files[name])

    async def tokenize(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        return web.json_response(self.reply, status=self.status)


@pytest.fixture
async def pod() -> AsyncIterator[Pod]:
    pod = Pod()
    app = web.Application()
    app.router.add_get("/tokenizer/{name}", pod.file)
    app.router.add_post("/tokenize", pod.tokenize)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    pod.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield pod
    await runner.cleanup()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def threads() -> Iterator[TokenizeThreads]:
    threads = TokenizeThreads(1)
    yield threads
    threads.close()


async def test_a_tokenizer_is_loaded_once(
    pod: Pod, session: aiohttp.ClientSession, threads: TokenizeThreads
) -> None:
    source = TokenizerSource(session, threads)
    irrelevant = DIGESTS | {"generation_config.json": "0" * 64}
    first, second, third = await asyncio.gather(
        source.load(pod.url, DIGESTS, {}),
        source.load("http://127.0.0.1:1", irrelevant, {}),  # the same content elsewhere
        source.load(pod.url, DIGESTS, {"chat_template": "{{ 1 }}"}),
    )
    assert first is second
    assert first is not third
    assert source.loads == 2
    assert sorted(pod.fetched) == sorted([*FILES, *FILES])
    assert source.get(fingerprint(DIGESTS, {})) is first
    assert (await first.tokenize(TextPrompts(texts=["hello"])))[0].size > 0
    assert await source.load("http://127.0.0.1:1", DIGESTS, {}) is first
    source.retain({fingerprint(DIGESTS, {})})
    assert source.get(fingerprint(DIGESTS, {"chat_template": "{{ 1 }}"})) is None
    assert source.get(fingerprint(DIGESTS, {})) is first


async def test_files_are_kept_across_restarts(
    pod: Pod, session: aiohttp.ClientSession, threads: TokenizeThreads, tmp_path: Path
) -> None:
    await TokenizerSource(session, threads, folder=tmp_path).load(pod.url, DIGESTS, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(DIGESTS.values())
    pod.fetched.clear()
    await TokenizerSource(session, threads, folder=tmp_path).load(pod.url, DIGESTS, {})
    assert pod.fetched == []
    (tmp_path / DIGESTS["tokenizer.json"]).write_bytes(b"damaged")
    await TokenizerSource(session, threads, folder=tmp_path).load(pod.url, DIGESTS, {})
    assert pod.fetched == ["tokenizer.json"]
    assert (tmp_path / DIGESTS["tokenizer.json"]).read_bytes() == FILES["tokenizer.json"]


async def test_what_cannot_be_loaded_says_why_and_is_tried_again(
    pod: Pod, session: aiohttp.ClientSession, threads: TokenizeThreads
) -> None:
    source = TokenizerSource(session, threads)
    pod.files["tokenizer.json"] = FILES["tokenizer.json"] + b" "
    with pytest.raises(NotExact, match="sha256"):
        await source.load(pod.url, DIGESTS, {})
    del pod.files["tokenizer.json"]
    with pytest.raises(NotExact, match="404"):
        await source.load(pod.url, DIGESTS, {})
    with pytest.raises(NotExact, match="cannot be fetched"):
        await source.load("http://127.0.0.1:1", DIGESTS, {})
    with pytest.raises(NotExact, match=r"no tokenizer\.json"):
        await source.load(pod.url, {}, {})
    pod.files = dict(FILES)
    assert await source.load(pod.url, DIGESTS, {})


async def test_the_hash_cannot_name_another_path(
    pod: Pod, session: aiohttp.ClientSession, threads: TokenizeThreads, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"{}")
    source = TokenizerSource(session, threads, folder=tmp_path / "kept")
    with pytest.raises(NotExact, match="sha256"):
        await source.load(pod.url, {"tokenizer.json": "../outside"}, {})
    assert outside.read_bytes() == b"{}"


async def test_an_engine_is_asked_as_its_chat_api_would_be(
    pod: Pod, session: aiohttp.ClientSession
) -> None:
    remote = RemoteTokenizer(session, pod.url, model="m")
    prompt = ChatPrompt(
        messages=PROMPT.messages,
        tools=[{"function": {"name": "f"}}],
        documents=[{"a": "b"}],
        reasoning_effort="high",
        chat_template_kwargs={"x": 1},
    )
    assert [tokens.tolist() for tokens in await remote.tokenize(prompt)] == [[1, 2, 3]]
    assert pod.asked == [
        {
            "model": "m",
            "messages": [
                {"role": "user", "content": "hi", "reasoning_content": "r", "reasoning": "r"}
            ],
            "add_generation_prompt": True,
            "continue_final_message": False,
            "add_special_tokens": False,
            "tools": [{"function": {"name": "f"}}],
            "chat_template_kwargs": {
                "x": 1,
                "documents": [{"a": "b"}],
                "reasoning_effort": "high",
                "enable_thinking": True,
            },
        }
    ]
    pod.asked.clear()
    await remote.tokenize(TextPrompts(texts=["a", "b"]))
    assert [question["prompt"] for question in pod.asked] == ["a", "b"]
    assert all(question["add_special_tokens"] for question in pod.asked)
    pod.asked.clear()
    assert [t.tolist() for t in await remote.tokenize(TokenPrompts(prompts=[[7]]))] == [[7]]
    assert pod.asked == []


async def test_an_engine_that_does_not_say(pod: Pod, session: aiohttp.ClientSession) -> None:
    remote = RemoteTokenizer(session, pod.url)
    pod.status = 400
    with pytest.raises(NotExact, match="answered 400"):
        await remote.tokenize(PROMPT)
    pod.status = 200
    for reply in ({}, {"tokens": ["a"]}, {"tokens": [-1]}, {"tokens": [2**40]}):
        pod.reply = reply
        with pytest.raises(NotExact, match="understood"):
            await remote.tokenize(PROMPT)
    with pytest.raises(NotExact, match="cannot be asked"):
        await RemoteTokenizer(session, "http://127.0.0.1:1").tokenize(PROMPT)
    cut = Encoding(add_special_tokens=True, truncate_prompt_tokens=3)
    with pytest.raises(NotExact, match="truncate"):
        await remote.tokenize(TextPrompts(texts=["a"], encoding=cut))
    assert json.dumps(pod.asked)


async def test_a_lone_surrogate_is_not_asked_about(
    pod: Pod, session: aiohttp.ClientSession
) -> None:
    with pytest.raises(NotExact):
        await RemoteTokenizer(session, pod.url).tokenize(TextPrompts(texts=["\ud800"]))
    assert pod.asked == []
