"""Bodies are parsed as vLLM would read them, or refused with a 400 that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dynamo_epp.requests import (
    PATHS,
    BadRequest,
    ChatPrompt,
    Kind,
    ParsedRequest,
    TextPrompts,
    TokenPrompts,
    error_body,
    parse,
)
from hypothesis import given
from hypothesis import strategies as st

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
EMBEDDINGS, RESPONSES = "/v1/embeddings", "/v1/responses"
USER = {"role": "user", "content": "hi"}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


def refusal(path: str, content: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse(path, content)
    return caught.value


def test_a_chat_with_everything() -> None:
    request = parse(
        CHAT + "?x=1",
        body(
            messages=[USER],
            stream=True,
            n=2,
            max_tokens=5,
            max_completion_tokens=7,
            cache_salt="s",
            tools=[{"type": "function", "function": {"name": "f"}}],
            tool_choice="none",
            add_generation_prompt=False,
            continue_final_message=True,
            chat_template_kwargs={"a": 1},
            documents=[{"text": "t"}],
            reasoning_effort="low",
            add_special_tokens=True,
            truncate_prompt_tokens=3,
            truncation_side="left",
            kv_transfer_params=None,
            something_new={"x": 1},
        ),
    )
    assert (request.kind, request.model, request.lora) == (Kind.CHAT, "m", "m")
    assert (request.stream, request.n, request.max_tokens, request.cache_salt) == (True, 2, 7, "s")
    assert request.has_kv_transfer_params
    prompt = request.prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages == [USER]
    assert prompt.tools is not None
    assert prompt.tool_choice_none
    assert (prompt.add_generation_prompt, prompt.continue_final_message) == (False, True)
    assert prompt.chat_template_kwargs == {"a": 1}
    assert prompt.documents == [{"text": "t"}]
    assert prompt.reasoning_effort == "low"
    encoding = prompt.encoding
    assert (encoding.add_special_tokens, encoding.truncate_prompt_tokens) == (True, 3)
    assert encoding.truncation_side == "left"


def test_defaults_are_those_of_vllm() -> None:
    chat = parse(CHAT, body(messages=[USER]))
    assert (chat.stream, chat.n, chat.max_tokens, chat.cache_salt) == (False, 1, None, "")
    assert isinstance(chat.prompt, ChatPrompt)
    assert chat.prompt.add_generation_prompt
    assert not chat.prompt.encoding.add_special_tokens
    text = parse(TEXT, body(prompt="a"))
    assert text.max_tokens == 16
    assert isinstance(text.prompt, TextPrompts)
    assert text.prompt.encoding.add_special_tokens


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", ["a"]),
        (["a", ""], ["a", ""]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
@pytest.mark.parametrize(("path", "name"), [(TEXT, "prompt"), (EMBEDDINGS, "input")])
def test_text_and_tokens(path: str, name: str, value: Any, expected: list[Any]) -> None:
    prompt = parse(path, body(**{name: value})).prompt
    if isinstance(prompt, TextPrompts):
        assert list(prompt.texts) == expected
    else:
        assert isinstance(prompt, TokenPrompts)
        assert [list(tokens) for tokens in prompt.prompts] == expected


def test_embeddings_of_a_chat_have_no_generation_prompt() -> None:
    for fields in ({"messages": [USER]}, {"input": [USER]}):
        prompt = parse(EMBEDDINGS, body(**fields)).prompt
        assert isinstance(prompt, ChatPrompt)
        assert not prompt.add_generation_prompt


def test_plain_responses_become_chats() -> None:
    prompt = parse(RESPONSES, body(input="hi", instructions="be brief")).prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages == [{"role": "system", "content": "be brief"}, USER]
    assert prompt.encoding.add_special_tokens  # vLLM's default for this API alone


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (RESPONSES, {"input": "a", "previous_response_id": "r"}, "lives in the engine"),
        (RESPONSES, {"input": "a", "tools": [{"type": "function"}]}, "tools"),
        (RESPONSES, {"input": [{"type": "function_call"}]}, "not a plain message"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
        (TEXT, {"prompt_embeds": "AAAA"}, "embeddings"),
        (TEXT, {"prompt": [1, 2.5]}, "mixes"),
        (TEXT, {"prompt": []}, "empty"),
        (EMBEDDINGS, {"messages": [[USER]]}, "batch"),
        (EMBEDDINGS, {"input": [{"content": []}]}, "not text"),
        (EMBEDDINGS, {"input": "a", "truncate_prompt_tokens": 3}, "truncates"),
    ],
)
def test_what_only_the_engine_can_tokenize(path: str, fields: dict[str, Any], reason: str) -> None:
    request = parse(path, body(**fields))
    assert request.prompt is None
    assert reason in request.not_tokenizable


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"image_url": "http://x"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "video_url", "video_url": {"url": "x"}},
        {"type": "text", "text": "a", "image_embeds": "x"},
        {"type": 5},
    ],
)
def test_media_is_multimodal(part: dict[str, Any]) -> None:
    request = parse(CHAT, body(messages=[USER, {"role": "user", "content": ["a", part]}]))
    assert request.multimodal
    assert request.prompt is None
    assert "message 1" in request.not_tokenizable


@pytest.mark.parametrize(
    "fields", [{"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "x"}}]
)
def test_a_client_template_is_never_executed(fields: dict[str, Any]) -> None:
    request = parse(CHAT, body(messages=[USER], **fields))
    assert request.untrusted_template
    assert request.prompt is None


@pytest.mark.parametrize(
    ("path", "content", "words", "param"),
    [
        (CHAT, b"", "empty", None),
        (CHAT, b'{"a": 1,\n "b": }', "line 2, column 7", None),
        (CHAT, b'{"a": "\xff"}', "byte", None),
        (CHAT, b"[1]", "not an array", None),
        (CHAT, b"[" * 100_000, "nested", None),
        (CHAT, b'{"a": ' + b"1" * 5000 + b"}", "digits", None),
        (CHAT, b'{"messages": []}', "`model` is required", "model"),
        (CHAT, b'{"model": 1, "messages": []}', "string, not a number", "model"),
        (CHAT, b'{"model": "", "messages": []}', "empty", "model"),
        (CHAT, body(), "`messages` is required", "messages"),
        (CHAT, body(messages="a"), "array of messages, not a string", "messages"),
        (CHAT, body(messages=[USER, 3]), "not a number", "messages[1]"),
        (CHAT, body(messages=[{"content": "a"}]), "required", "messages[0].role"),
        (CHAT, body(messages=[{"role": 1}]), "a string", "messages[0].role"),
        (CHAT, body(messages=[{"role": "user", "content": 1}]), "parts", "messages[0].content"),
        (CHAT, body(messages=[USER], stream="maybe"), "true or false", "stream"),
        (CHAT, body(messages=[USER], n="two"), "integer", "n"),
        (CHAT, body(messages=[USER], max_tokens=1.5), "integer", "max_tokens"),
        (CHAT, body(messages=[USER], tools=[{}]), "name", "tools[0]"),
        (CHAT, body(messages=[USER], tools={}), "array, not an object", "tools"),
        (CHAT, body(messages=[USER], cache_salt=[]), "string", "cache_salt"),
        (CHAT, body(messages=[USER], chat_template_kwargs=1), "object", "chat_template_kwargs"),
        (TEXT, body(), "`prompt` is required", "prompt"),
        (TEXT, body(prompt={}), "not an object", "prompt"),
        (TEXT, body(prompt=[{}]), "text or tokens", "prompt[0]"),
        (TEXT, body(prompt=[-1]), "negative", "prompt"),
        (EMBEDDINGS, body(), "`input` is required", "input"),
        (RESPONSES, body(input=5), "not a number", "input"),
    ],
)
def test_mistakes_are_named(path: str, content: bytes, words: str, param: str | None) -> None:
    error = refusal(path, content)
    assert error.status == 400
    assert words in error.message
    assert error.param == param
    answer = json.loads(error.body())["error"]
    assert answer["type"] == "invalid_request_error"
    assert (answer["message"], answer["param"], answer["code"]) == (
        error.message,
        param,
        error.code,
    )


def test_an_unknown_path_is_404() -> None:
    assert refusal("/v1/audio", b"{}").status == 404


def test_what_json_accepts_beyond_the_standard_is_accepted() -> None:
    """vLLM reads bodies with Python's json module."""
    assert parse(CHAT, b'\xef\xbb\xbf{"model":"m","messages":[],"x":NaN}').model == "m"
    assert parse(TEXT, body(prompt="a").decode().encode("utf-16")).model == "m"
    lone = parse(TEXT, b'{"model":"m","prompt":"\\ud800"}')
    assert isinstance(lone.prompt, TextPrompts)


def test_numbers_and_flags_may_be_strings() -> None:
    """pydantic converts them, so a client that sends them works with vLLM."""
    request = parse(CHAT, body(messages=[USER], stream="true", n="2", max_tokens=5.0))
    assert (request.stream, request.n, request.max_tokens) == (True, 2, 5)
    assert not parse(CHAT, body(messages=[USER], stream=0)).stream


def test_error_bodies_have_the_type_of_their_status() -> None:
    assert json.loads(error_body(429, "slow down"))["error"] == {
        "message": "slow down",
        "type": "rate_limit_error",
        "param": None,
        "code": None,
    }
    assert json.loads(error_body(503, "m"))["error"]["type"] == "server_error"


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "text", "image_url", "none", "hi"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "function", "name", "effort", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FIELDS = [
    *("model", "messages", "prompt", "input", "tools", "stream", "n", "max_tokens", "suffix"),
    *("max_completion_tokens", "cache_salt", "chat_template", "chat_template_kwargs", "documents"),
    *("instructions", "reasoning", "truncation", "vllm_xargs", "kv_transfer_params", "padding"),
    *("prompt_embeds", "truncate_prompt_tokens", "add_generation_prompt"),
]


def parsed_or_refused(path: str, content: bytes) -> ParsedRequest | BadRequest:
    try:
        return parse(path, content)
    except BadRequest as error:
        return error


def test_a_salt_that_no_key_can_hold_is_routed_by_load() -> None:
    content = json.dumps({"model": "m", "messages": [USER], "cache_salt": "a\ud800"}).encode()
    request = parse(CHAT, content)
    assert (request.prompt, request.cache_salt) == (None, "")
    assert request.not_tokenizable == "the cache salt is no Unicode text"


@given(st.sampled_from(list(PATHS)), st.binary(max_size=60))
def test_any_bytes_parse_or_are_refused(path: str, content: bytes) -> None:
    outcome = parsed_or_refused(path, content)
    assert isinstance(outcome, ParsedRequest) or outcome.status == 400


@given(
    st.sampled_from(list(PATHS)),
    st.dictionaries(st.sampled_from(FIELDS), anything, max_size=8),
    st.booleans(),
)
def test_any_json_parses_or_is_refused(path: str, fields: dict[str, Any], named: bool) -> None:
    if named:
        fields |= {"model": "m"}
    outcome = parsed_or_refused(path, json.dumps(fields).encode())
    if isinstance(outcome, ParsedRequest):
        assert (outcome.prompt is None) == bool(outcome.not_tokenizable)
    else:
        assert outcome.status == 400
        assert json.loads(outcome.body())["error"]["message"]


@pytest.mark.parametrize("model", ["m" * 1025, "\ud800"])
def test_a_name_that_no_model_has_is_refused_and_not_repeated(model: str) -> None:
    error = refusal(CHAT, body(model=model, messages=[USER]))
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert error.message == "`model` must be text of at most 1024 characters."
