"""The simulated engine as a process, asked by the clients that people use."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
import zmq
import zmq.asyncio
from dynamo_workers.tiny import TOKENIZER_FOLDER
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

BLOCK = 16
TOPIC = "kv@pod-0@tiny"


@contextlib.contextmanager
def sim(*flags: str, env: dict[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """Runs the engine on a free loopback port; gives its URL and its process."""
    command = [sys.executable, "-m", "dynamo_workers.sim", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(
        [*command, *flags], stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    ) as process:
        try:
            assert process.stderr is not None
            seen = ""
            for line in process.stderr:
                seen += line
                if found := re.search(r"serving at 127\.0\.0\.1:(\d+)", line):
                    yield f"http://127.0.0.1:{found[1]}", process
                    return
            pytest.fail(f"the engine did not start:\n{seen}")
        finally:
            process.kill()


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sim")
    return f"ipc://{folder}/events", f"ipc://{folder}/replay"


@pytest.fixture(scope="module")
def url(sockets: tuple[str, str]) -> Iterator[str]:
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": sockets[0],
        "replay_endpoint": sockets[1],
        "topic": TOPIC,
    }
    flags = ["--model", "tiny", "--speed", "10", "--max-model-len", "2048"]
    flags += ["--num-gpu-blocks-override", "200", "--block-size", str(BLOCK)]
    flags += ["--enable-prompt-tokens-details", "--enable-request-id-headers"]
    flags += ["--kv-events-config", json.dumps(events)]
    with sim(*flags, env={"VLLM_SERVER_DEV_MODE": "1"}) as (address, _process):
        yield address


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def http(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url) as session:
        yield session


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER_FOLDER / "tokenizer.json"))


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def samples(http: aiohttp.ClientSession) -> dict[tuple[str, str], float]:
    """All samples of /metrics by name and the one label that tells series of a family apart."""
    async with http.get("/metrics") as response:
        text = await response.text()
    result = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            rest = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
            result[sample.name, ",".join(rest.values())] = sample.value
    return result


# --- answers --------------------------------------------------------------------------------------


async def test_streamed_and_whole_chat_say_the_same(client: openai.AsyncOpenAI):
    whole = await client.chat.completions.create(model="tiny", messages=user("say something"))
    text, reasons, usage = "", [], None
    stream = await client.chat.completions.create(
        model="tiny",
        messages=user("say something"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert len(text.split()) > 10
    assert reasons == [whole.choices[0].finish_reason] == ["stop"]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == len(text.split()) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 5


async def test_a_conversation_finds_its_own_blocks_again(client: openai.AsyncOpenAI):
    messages: list[Any] = user("a question that nobody else asks: " + "why " * 60)
    first = await client.chat.completions.create(model="tiny", messages=messages)
    assert first.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages += user("and then?")
    second = await client.chat.completions.create(model="tiny", messages=messages)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    # Everything but the end token of the first answer was computed, in whole blocks.
    computed = first.usage.total_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == computed // BLOCK * BLOCK


async def test_token_limits_and_stops(client: openai.AsyncOpenAI):
    async def ask(**more: Any) -> tuple[str, str, int]:
        answer = await client.chat.completions.create(model="tiny", messages=user("count"), **more)
        assert answer.usage is not None
        choice = answer.choices[0]
        return choice.message.content or "", choice.finish_reason, answer.usage.completion_tokens

    natural, reason, _ = await ask()
    assert reason == "stop"
    words = natural.split(" ")
    assert await ask(max_tokens=5) == (" ".join(words[:5]), "length", 5)
    assert await ask(max_completion_tokens=4, max_tokens=9) == (" ".join(words[:4]), "length", 4)
    assert (await ask(max_tokens=300, extra_body={"ignore_eos": True}))[1:] == ("length", 300)
    stopped, reason, tokens = await ask(stop=[words[7]])
    assert natural.startswith(stopped)
    assert words[7] not in stopped
    assert (reason, tokens <= 8) == ("stop", True)
    assert (await ask(extra_body={"min_tokens": 200}))[2] > 200


async def test_n_answers_share_one_prompt(client: openai.AsyncOpenAI):
    answer = await client.chat.completions.create(
        model="tiny", messages=user("several"), n=3, max_tokens=6
    )
    texts = {choice.message.content for choice in answer.choices}
    assert (len(texts), [choice.index for choice in answer.choices]) == (3, [0, 1, 2])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 18
    single = await client.chat.completions.create(
        model="tiny", messages=user("several"), max_tokens=6
    )
    assert single.usage is not None
    assert single.usage.prompt_tokens == answer.usage.prompt_tokens
    assert single.choices[0].message.content == answer.choices[0].message.content


async def test_completions_take_text_texts_and_tokens(
    http: aiohttp.ClientSession, tokenizer: Tokenizer
):
    async def ask(prompt: Any, **more: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "return_token_ids": True, **more}
        async with http.post("/v1/completions", json=body) as response:
            assert response.status == 200
            answer: dict[str, Any] = await response.json()
            return answer

    text = await ask("once upon a time")
    ids = tokenizer.encode("once upon a time").ids
    assert text["choices"][0]["prompt_token_ids"] == ids
    assert text["usage"]["completion_tokens"] == 16
    tokens = await ask(ids)
    assert tokens["choices"][0]["text"] == text["choices"][0]["text"]
    produced = tokens["choices"][0]["token_ids"]
    assert tokenizer.decode(produced) == tokens["choices"][0]["text"]
    several = await ask(["once upon a time", "another"], n=2, max_tokens=3)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert several["choices"][0]["token_ids"] == produced[:3]
    assert several["usage"]["prompt_tokens"] == len(ids) + len(tokenizer.encode("another").ids)
    echo = await ask("once upon a time", echo=True, max_tokens=1)
    assert echo["choices"][0]["text"].startswith("once upon a time")


async def test_embeddings_are_deterministic_unit_vectors(http: aiohttp.ClientSession):
    async def ask(**more: Any) -> list[Any]:
        body = {"model": "tiny", **more}
        async with http.post("/v1/embeddings", json=body) as response:
            assert response.status == 200
            return [entry["embedding"] for entry in (await response.json())["data"]]

    one, other = await ask(input=["one", "other"])
    assert one != other
    assert sum(value * value for value in one) == pytest.approx(1.0, abs=1e-5)
    assert await ask(input="one") == [one]
    coded = (await ask(input="one", encoding_format="base64"))[0]
    assert list(struct.unpack(f"<{len(one)}f", base64.b64decode(coded))) == one
    assert len((await ask(input="one", dimensions=7))[0]) == 7
    assert await ask(input="one", add_special_tokens=False) != [one]


async def test_responses_api(client: openai.AsyncOpenAI):
    whole = await client.responses.create(model="tiny", input="hello", instructions="be brief")
    assert (whole.status, whole.usage is not None) == ("completed", True)
    stream = await client.responses.create(
        model="tiny", input="hello", instructions="be brief", stream=True
    )
    kinds, text = [], ""
    async for event in stream:
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == whole.output_text
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    cut = await client.responses.create(model="tiny", input="hello", max_output_tokens=3)
    assert cut.status == "incomplete"
    # As vLLM counts: its tokenizer begins this prompt with its special token, a chat's not.
    chat = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=3
    )
    assert cut.usage is not None
    assert chat.usage is not None
    assert cut.usage.input_tokens == chat.usage.prompt_tokens + 1
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        await client.responses.create(model="tiny", input="x", previous_response_id="resp_1")


async def test_small_routes(http: aiohttp.ClientSession, tokenizer: Tokenizer):
    for path in ("/health", "/ping"):
        async with http.get(path) as response:
            assert (response.status, await response.read()) == (200, b"")
    async with http.get("/v1/models") as response:
        models = (await response.json())["data"]
        assert [(m["id"], m["max_model_len"]) for m in models] == [("tiny", 2048)]
    async with http.post(
        "/tokenize", json={"prompt": "a b", "return_token_strs": True}
    ) as response:
        body = await response.json()
        assert body["tokens"] == tokenizer.encode("a b").ids
        assert (body["count"], body["token_strs"][0]) == (3, "<|bos|>")
    async with http.post("/tokenize", json={"messages": user("hi")}) as response:
        ids = (await response.json())["tokens"]
    async with http.post("/detokenize", json={"tokens": ids}) as response:
        prompt = (await response.json())["prompt"]
    assert prompt == "<|bos|><|user|>hi<|end|><|assistant|>"


async def test_request_ids_are_taken_over_and_echoed(http: aiohttp.ClientSession):
    body = {"model": "tiny", "messages": user("x"), "max_tokens": 1}
    headers = {"x-request-id": "req-7"}
    async with http.post("/v1/chat/completions", json=body, headers=headers) as response:
        assert response.headers["x-request-id"] == "req-7"
        assert (await response.json())["id"] == "chatcmpl-req-7"


CHAT: dict[str, Any] = {"model": "tiny", "messages": user("x")}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        ("chat/completions", {**CHAT, "model": "gone"}, 404, "model", "`gone` does not exist"),
        ("completions", {"model": "gone", "prompt": "x"}, 404, "model", "Valid aliases: tiny"),
        ("chat/completions", {"model": "tiny"}, 400, "messages", "Field required"),
        ("chat/completions", {"model": "tiny", "messages": []}, 400, None, "empty conversation"),
        ("chat/completions", {**CHAT, "max_tokens": 0}, 400, "max_tokens", "at least 1, got 0"),
        ("chat/completions", {**CHAT, "max_tokens": "no"}, 400, "max_tokens", "an integer"),
        ("chat/completions", {**CHAT, "max_tokens": 9999}, 400, "max_tokens", "max_model_len=2048"),
        (
            "chat/completions",
            {"model": "tiny", "messages": user("hello " * 3000)},
            400,
            "input_tokens",
            "maximum context length is 2048 tokens",
        ),
        ("chat/completions", {**CHAT, "cache_salt": ""}, 400, "cache_salt", "non-empty"),
        ("chat/completions", {**CHAT, "logprobs": True}, 400, "logprobs", "does not support"),
        ("chat/completions", {**CHAT, "stream_options": {}}, 400, "stream_options", "stream=True"),
        (
            "chat/completions",
            {"model": "tiny", "messages": [{"role": "alien", "content": "x"}]},
            400,
            None,
            "Unknown role alien",
        ),
        ("completions", {"model": "tiny", "prompt": []}, 400, None, "at least one prompt"),
        ("completions", {"model": "tiny", "prompt": [99999]}, 400, None, "out of vocabulary"),
        ("embeddings", {"model": "tiny"}, 400, "input", "must be provided"),
    ],
)
async def test_refusals_have_openai_bodies(
    http: aiohttp.ClientSession,
    path: str,
    body: dict[str, Any],
    status: int,
    param: str | None,
    words: str,
):
    async with http.post(f"/v1/{path}", json=body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (status, status, param)
        assert words in error["message"]
        assert error["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]


async def test_other_paths_and_broken_json(http: aiohttp.ClientSession):
    async with http.get("/v1/nothing") as response:
        assert (response.status, await response.json()) == (404, {"detail": "Not Found"})
    async with http.get("/v1/completions") as response:
        assert (response.status, response.headers["allow"]) == (405, "POST")
    async with http.post("/v1/completions", data=b"{no") as response:
        assert response.status == 400
        assert "JSON decode error" in (await response.json())["error"]["message"]


# --- events ---------------------------------------------------------------------------------------


async def test_events_tell_the_cached_blocks_and_can_be_replayed(
    http: aiohttp.ClientSession, sockets: tuple[str, str]
):
    context = zmq.asyncio.Context()
    subscriber, dealer = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    try:
        subscriber.connect(sockets[0])
        subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
        dealer.connect(sockets[1])
        async with http.get("/kv_event_sources") as response:
            source = (await response.json())["0"]
            assert (source["endpoint"], source["topic"]) == (sockets[0], TOPIC)

        async def ask(text: str, **more: Any) -> dict[str, Any]:
            body = {"model": "tiny", "prompt": text, "max_tokens": 20, "return_token_ids": True}
            async with http.post(
                "/v1/completions", json={**body, "ignore_eos": True, **more}
            ) as response:
                choice: dict[str, Any] = (await response.json())["choices"][0]
                return choice

        # Subscribing is not confirmed: ask until the first message comes.
        frames: list[bytes] = []
        for number in range(100):
            await ask(f"warm {number} " * 20)
            if await subscriber.poll(50):
                frames = await subscriber.recv_multipart()
                break
        assert [len(frames), frames[0]] == [3, TOPIC.encode()]
        while await subscriber.poll(200):
            frames = await subscriber.recv_multipart()
        last = int.from_bytes(frames[1], "big")

        choice = await ask("an unheard story " * 10, cache_salt="tenant")
        tokens = choice["prompt_token_ids"] + choice["token_ids"]
        live, events = [], []
        full = (len(tokens) - 1) // BLOCK
        while sum(len(e["block_hashes"]) for e in events if e["type"] == "BlockStored") < full:
            live.append(await asyncio.wait_for(subscriber.recv_multipart(), 5))
            timestamp, batch, rank = msgspec.msgpack.decode(live[-1][2])
            assert (isinstance(timestamp, float), rank) == (True, 0)
            events += batch
        assert [int.from_bytes(m[1], "big") for m in live] == [
            last + 1 + i for i in range(len(live))
        ]
        stored = [event for event in events if event["type"] == "BlockStored"]
        assert [t for event in stored for t in event["token_ids"]] == tokens[: full * BLOCK]
        assert stored[0] == {
            "type": "BlockStored",
            "block_hashes": stored[0]["block_hashes"],
            "parent_block_hash": None,
            "token_ids": stored[0]["token_ids"],
            "block_size": BLOCK,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [["tenant"]] + [None] * (len(stored[0]["block_hashes"]) - 1),
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
        assert stored[1]["parent_block_hash"] == stored[0]["block_hashes"][-1]

        await dealer.send_multipart([b"", (last + 1).to_bytes(8, "big")])
        replayed = []
        while (frames := await asyncio.wait_for(dealer.recv_multipart(), 5))[2] != b"\xff" * 8:
            replayed.append(frames[1:])
        assert replayed[: len(live)] == live
        assert frames == [b"", b"", b"\xff" * 8, b""]

        async with http.post("/reset_prefix_cache") as response:
            assert (await response.json()) == {"success": True}
        await ask("after")
        frames = await asyncio.wait_for(subscriber.recv_multipart(), 5)
        assert {"type": "AllBlocksCleared"} in msgspec.msgpack.decode(frames[2])[1]
    finally:
        context.destroy(linger=0)


# --- metrics --------------------------------------------------------------------------------------


async def test_metrics_count_what_happened(http: aiohttp.ClientSession):
    before = await samples(http)
    body = {**CHAT, "messages": user("metrics " * 50), "max_tokens": 8, "ignore_eos": True}
    usages = []
    for _ in range(2):
        async with http.post("/v1/chat/completions", json=body) as response:
            usages.append((await response.json())["usage"])
    after = await samples(http)

    def grown(name: str, label: str = "") -> float:
        return after[name, label] - before[name, label]

    prompt, cached = usages[0]["prompt_tokens"], usages[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert grown("vllm:prefix_cache_queries_total") == 2 * prompt
    assert grown("vllm:prefix_cache_hits_total") == cached
    assert grown("vllm:prompt_tokens_total") == 2 * prompt
    assert grown("vllm:prompt_tokens_by_source_total", "local_compute") == 2 * prompt - cached
    assert grown("vllm:prompt_tokens_by_source_total", "local_cache_hit") == cached
    assert grown("vllm:generation_tokens_total") == 16
    assert grown("vllm:request_success_total", "length") == 2
    assert grown("vllm:time_to_first_token_seconds_count") == 2
    assert grown("vllm:inter_token_latency_seconds_count") == 14
    assert grown("vllm:inter_token_latency_seconds_bucket", "+Inf") == 14
    assert grown("vllm:e2e_request_latency_seconds_count") == 2
    assert after["vllm:num_requests_running", ""] == 0
    config = [labels for name, labels in after if name == "vllm:cache_config_info"]
    assert config == [f"{BLOCK},auto,True,{BLOCK * 200},200,sha256"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_blocks(http: aiohttp.ClientSession, stream: bool):
    body = {**CHAT, "max_tokens": 1900, "ignore_eos": True, "stream": stream}

    async def ask() -> None:
        async with http.post("/v1/chat/completions", json=body) as response:
            await response.content.readany()
            await asyncio.Event().wait()

    task = asyncio.create_task(ask())
    while not (seen := await samples(http))["vllm:num_requests_running", ""]:
        assert not task.done()
    assert seen["vllm:kv_cache_usage_perc", ""] > 0
    async with http.get("/load") as response:
        assert await response.json() == {"server_load": 1}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        while (seen := await samples(http))["vllm:num_requests_running", ""]:
            pass
    assert seen["vllm:kv_cache_usage_perc", ""] == 0
    async with http.get("/load") as response:
        assert await response.json() == {"server_load": 0}


# --- the process ----------------------------------------------------------------------------------


async def test_deterministic_answers_are_equal_byte_for_byte():
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**CHAT, "stream": stream, "max_tokens": n})
        for stream in (True, False)
        for n in (1, 7, 40)
    ]
    requests.append(("/v1/completions", {"model": "tiny", "prompt": "x", "return_token_ids": True}))
    requests.append(("/v1/embeddings", {"model": "tiny", "input": "x"}))
    requests.append(("/v1/responses", {"model": "tiny", "input": "x", "stream": True}))

    async def bodies(flags: list[str], times: int) -> list[list[bytes]]:
        with sim("--deterministic", "--enable-prompt-tokens-details", *flags) as (address, _):
            async with aiohttp.ClientSession(address) as session:

                async def ask(path: str, body: dict[str, Any]) -> bytes:
                    async with session.post(path, json=body) as response:
                        assert response.status == 200
                        return await response.read()

                rounds = [asyncio.gather(*(ask(*each) for each in requests)) for _ in range(times)]
                return list(await asyncio.gather(*rounds))

    slow = await bodies(["--speed", "20", "--block-size", "32"], 1)
    fast = await bodies(["--speed", "0", "--max-num-seqs", "5"], 6)
    assert fast == slow * 6
    assert slow[0][0].count(b"data: ") == 3  # role, one token, [DONE]


MIDDLEWARE = """
class Stamp:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def sending(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", b"class")]
            await send(message)

        await self.app(scope, receive, sending if scope["type"] == "http" else send)


async def teapot(request, call_next):
    response = await call_next(request)
    response.headers["x-teapot"] = "function"
    return response


value = 3
"""


async def test_middleware_of_both_kinds(tmp_path: Path):
    (tmp_path / "extra_layer.py").write_text(MIDDLEWARE)
    flags = ["--middleware", "extra_layer.Stamp", "--middleware", "extra_layer.teapot"]
    with sim("--speed", "0", *flags, env={"PYTHONPATH": str(tmp_path)}) as (address, _):
        async with (
            aiohttp.ClientSession(address) as session,
            session.post("/v1/chat/completions", json={**CHAT, "stream": True}) as response,
        ):
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
            assert response.headers["x-stamp"] == "class"
            assert response.headers["x-teapot"] == "function"


async def test_sigterm_lets_streams_end_within_the_shutdown_timeout():
    with sim("--shutdown-timeout", "20", "--speed", "4") as (address, process):
        async with aiohttp.ClientSession(address) as session:
            body = {**CHAT, "stream": True, "max_tokens": 100, "ignore_eos": True}
            async with session.post("/v1/chat/completions", json=body) as response:
                await response.content.readline()
                process.send_signal(signal.SIGTERM)
                rest = await response.content.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        assert await asyncio.to_thread(process.wait, 10) == 0


async def test_sigterm_cuts_streams_without_a_shutdown_timeout():
    with sim() as (address, process):
        async with aiohttp.ClientSession(address) as session:
            body = {**CHAT, "stream": True, "max_tokens": 20_000, "ignore_eos": True}
            async with session.post("/v1/chat/completions", json=body) as response:
                await response.content.readline()
                process.send_signal(signal.SIGTERM)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.content.read()
        assert await asyncio.to_thread(process.wait, 10) == 0


async def test_adapters_are_models_with_answers_of_their_own():
    base: dict[str, Any] = {"prompt": "which adapter? " * 20, "max_tokens": 8}

    async def asked(http: aiohttp.ClientSession, model: str) -> dict[str, Any]:
        async with http.post("/v1/completions", json={**base, "model": model}) as response:
            return dict(await response.json())

    module = json.dumps({"name": "chat", "path": "/a/chat", "base_model_name": "tiny"})
    flags = ("--enable-lora", "--max-loras", "2", "--lora-modules", "sql=/a/sql", module)
    with sim("--model", "tiny", "--enable-prompt-tokens-details", *flags) as (address, _):
        async with aiohttp.ClientSession(address) as http:
            async with http.get("/v1/models") as response:
                cards = (await response.json())["data"]
            found = [(card["id"], card["root"], card["parent"]) for card in cards]
            assert found == [
                ("tiny", "tiny", None),
                ("sql", "/a/sql", "tiny"),
                ("chat", "/a/chat", "tiny"),
            ]
            answers = [await asked(http, model) for model in ("tiny", "sql", "chat", "sql")]
            assert [answer["model"] for answer in answers] == ["tiny", "sql", "chat", "sql"]
            texts = [answer["choices"][0]["text"] for answer in answers]
            assert len(set(texts[:3])) == 3
            assert texts[1] == texts[3]
            details = [answer["usage"]["prompt_tokens_details"] for answer in answers]
            cached = [each["cached_tokens"] if each else 0 for each in details]
            assert cached[:3] == [0, 0, 0]
            assert cached[3] > 0
            assert (await asked(http, "other"))["error"]["code"] == 404
            info = [labels for name, labels in await samples(http) if "lora" in name]
            assert info == ["2,,"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tokenizer", "/nowhere"), "/nowhere: no tokenizer.json there"),
        (("--lora-modules", "sql=/a"), "--lora-modules needs --enable-lora"),
    ],
)
def test_flags_that_cannot_be_used_end_with_one_clear_line(flags: tuple[str, ...], said: str):
    command = [sys.executable, "-m", "dynamo_workers.sim", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_in_use_is_one_clear_line():
    with sim() as (address, _):
        port = address.rpartition(":")[2]
        command = [sys.executable, "-m", "dynamo_workers.sim", "--host", "127.0.0.1"]
        done = subprocess.run(
            [*command, "--port", port], capture_output=True, text=True, check=False, timeout=30
        )
    assert done.returncode == 1
    assert f"cannot serve at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
