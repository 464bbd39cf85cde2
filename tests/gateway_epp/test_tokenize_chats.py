"""Chats through the bundled tokenizer: what the template sees, and the tokens that come out.

The expectations are vLLM's behaviour; e2e/test_tokenization_vllm.py compares with the real one.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from dynamo_epp.requests import ChatPrompt, Encoding, TextPrompts, TokenPrompts
from dynamo_epp.tokenize import NotExact, Tokenizer
from dynamo_workers.tiny import TOKENIZER_FILES, TOKENIZER_FOLDER

FILES = {name: (TOKENIZER_FOLDER / name).read_bytes() for name in TOKENIZER_FILES}
SEES = "{{ messages | tojson }}{{ tools | tojson }}"  # a template in the `string` format
SEES_PARTS = "{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}" + SEES
USER = {"role": "user", "content": "hi"}


def tokenizer(template: str = "", **settings: str) -> Tokenizer:
    if template:
        settings["chat_template"] = template
    return Tokenizer.from_files(FILES, settings)


def seen(template: str, *messages: dict[str, Any], **fields: Any) -> tuple[Any, Any]:
    """Messages and tools as the template gets them."""
    text = tokenizer(template).render(ChatPrompt(messages=messages, **fields))
    decoder = json.JSONDecoder()
    first, end = decoder.raw_decode(text)
    return first, decoder.raw_decode(text[end:])[0]


def test_the_bundled_template() -> None:
    ours = tokenizer()
    prompt = ChatPrompt(messages=[{"role": "system", "content": "s"}, USER])
    assert ours.render(prompt) == "<|bos|><|system|>s<|end|><|user|>hi<|end|><|assistant|>"
    tokens = ours.encode_chat(prompt)
    assert tokens.dtype == np.uint32
    named = json.loads(FILES["tokenizer.json"])["added_tokens"]
    ids = {token["content"]: token["id"] for token in named}
    assert tokens[0] == ids["<|bos|>"]
    assert tokens[-1] == ids["<|assistant|>"]
    assert list(tokens).count(ids["<|bos|>"]) == 1  # none added on top of the template's


@pytest.mark.parametrize("content", ["a\nb", ["a", {"type": "text", "text": "b"}]])
def test_text_is_joined_for_string_templates(content: Any) -> None:
    messages, _ = seen(SEES, {"role": "user", "content": content})
    assert messages == [{"role": "user", "content": "a\nb"}]


def test_text_is_wrapped_for_templates_that_read_parts() -> None:
    part = {"type": "output_text", "text": "b", "cache_control": 1, "name": "x"}
    messages, _ = seen(SEES_PARTS, USER, {"role": "user", "content": ["a", part]})
    assert messages == [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "text", "text": "b", "cache_control": 1},
            ],
        },
    ]


@pytest.mark.parametrize(
    ("format", "expected"), [("string", "hi"), ("openai", [{"type": "text", "text": "hi"}])]
)
def test_the_format_can_be_forced(format: str, expected: Any) -> None:
    ours = tokenizer(SEES, chat_template_content_format=format)
    assert json.loads(ours.render(ChatPrompt(messages=[USER])).removesuffix("null")) == [
        {"role": "user", "content": expected}
    ]


def test_tool_calls() -> None:
    calls = [
        {
            "type": "function",
            "index": 0,
            "id": "1",
            "function": {"name": "f", "arguments": '{"a": 1}'},
        },
        {"id": "2", "function": {"arguments": "oops", "name": "g", "x": 1}, "type": "function"},
        {"id": "3", "function": {"arguments": "[1]", "name": "h"}, "type": "function"},
    ]
    messages, _ = seen(SEES, {"role": "assistant", "content": None, "tool_calls": calls})
    assert json.dumps(messages) == json.dumps(  # the order of keys counts too
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": "1",
                        "function": {"arguments": {"a": 1}, "name": "f"},
                        "type": "function",
                        "index": 0,
                    },
                    {
                        "id": "2",
                        "function": {"arguments": {}, "name": "g", "x": 1},
                        "type": "function",
                    },
                    {"id": "3", "function": {"arguments": {}, "name": "h"}, "type": "function"},
                ],
            }
        ]
    )


def test_what_messages_keep_and_lose() -> None:
    messages, _ = seen(
        SEES,
        {"role": "assistant", "content": "a", "tool_calls": [], "reasoning_content": "r", "x": 1},
        {"role": "tool", "content": [{"type": "text", "text": "t"}], "tool_call_id": "1"},
        {"role": "user", "content": "u", "name": "bob", "tool_calls": [1]},
    )
    assert messages == [
        {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r"},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
        {"role": "user", "content": "u", "name": "bob"},
    ]


def test_tools_are_dumped_with_nulls_in_a_fixed_order() -> None:
    given = [
        {"function": {"parameters": {"z": 1, "a": 2}, "name": "f", "extra": 1}, "x": 1},
        {"type": "function", "defer_loading": True, "function": {"name": "g", "strict": False}},
    ]
    _, tools = seen(SEES, USER, tools=given)
    first = {"name": "f", "description": None, "parameters": {"z": 1, "a": 2}}
    second = {
        "name": "g",
        "description": None,
        "parameters": None,
        "strict": False,
        "defer_loading": True,
    }
    assert json.dumps(tools) == json.dumps(
        [
            {"type": "function", "function": first},
            {"type": "function", "function": second, "defer_loading": True},
        ]
    )


def test_tools_can_be_excluded() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    prompt = ChatPrompt(messages=[USER], tools=tools, tool_choice_none=True)
    assert '"name": "f"' in tokenizer(SEES).render(prompt)
    excluding = tokenizer(SEES, exclude_tools_when_tool_choice_none="true")
    assert excluding.render(prompt).endswith("null")


def test_the_developer_role_becomes_system_where_templates_lack_it() -> None:
    developer = {"role": "developer", "content": "d", "tools": []}
    messages, _ = seen(SEES, developer, USER)
    assert messages == [{"role": "system", "content": "d"}, USER]
    messages, _ = seen(SEES, USER, {"role": "system", "content": "s"}, developer)
    assert messages == [{"role": "system", "content": "s\n\nd"}, USER]
    messages, _ = seen(SEES + "{# 'developer' #}", developer)
    assert messages == [developer]


def test_arguments_reach_the_template() -> None:
    source = (
        "{{ a }}{{ enable_thinking }}{{ reasoning_effort }}{{ documents | tojson }}{{ eos_token }}"
    )
    ours = tokenizer(source, default_chat_template_kwargs='{"a": 1, "enable_thinking": true}')
    render = ours.render
    assert render(ChatPrompt(messages=[USER])) == "1Truenull<|end|>"
    effort = ChatPrompt(
        messages=[USER],
        reasoning_effort="none",
        documents=[{"t": 1}],
        chat_template_kwargs={"a": None, "unused": 1, "eos_token": "E"},
    )
    assert render(effort) == '1Falsenone[{"t": 1}]E'


def test_continuing_the_final_message() -> None:
    ours = tokenizer()
    messages = [USER, {"role": "assistant", "content": " It is "}]
    prompt = ChatPrompt(messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert ours.render(prompt).endswith("<|assistant|> It is ")
    assert messages[1]["content"] == " It is "  # the client's message is not changed
    trimming = tokenizer("{% for m in messages %}{{ m.content | trim }}{% endfor %}!")
    assert trimming.render(prompt) == "hiIt is"
    both = ChatPrompt(messages=messages, continue_final_message=True)
    with pytest.raises(NotExact, match="add_generation_prompt"):
        ours.render(both)
    lost = tokenizer("{# content #}nothing")
    with pytest.raises(NotExact, match="changes the final message"):
        lost.render(prompt)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": None}, "null"),
        ({"role": "user", "content": {}}, "neither text nor parts"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "image_url"),
        ({"role": "user", "content": [{"type": "text"}]}, "carries no text"),
        ({"role": "user", "content": [5]}, "neither text nor an object"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "not of type function"),
        ({"role": "assistant", "tool_calls": {}}, "not an array"),
        ({"role": "critic", "content": "x"}, "Unknown role"),
        ({"author": {"role": "user"}}, "no role"),
        ({"role": "user", "content": "\ud800"}, "cannot be tokenized"),
    ],
)
def test_what_the_engine_refuses_is_not_exact(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotExact, match=reason):
        tokenizer().encode_chat(ChatPrompt(messages=[message]))


@pytest.mark.parametrize("argument", ["tools", "tokenize", "conversation", "chat_template"])
def test_arguments_of_the_call_itself_are_declined(argument: str) -> None:
    with pytest.raises(NotExact, match=argument):
        tokenizer().render(ChatPrompt(messages=[USER], chat_template_kwargs={argument: 1}))


def test_named_templates() -> None:
    config = json.loads(FILES["tokenizer_config.json"])
    config["chat_template"] = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]
    files = {"tokenizer.json": FILES["tokenizer.json"]}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    tool = {"function": {"name": "f"}}
    ours = Tokenizer.from_files(files, {})
    assert ours.render(ChatPrompt(messages=[USER])) == "plain"
    assert ours.render(ChatPrompt(messages=[USER], tools=[tool])) == "tools"
    named = Tokenizer.from_files(files, {"chat_template": "tool_use"})
    assert named.render(ChatPrompt(messages=[USER])) == "tools"
    # A file of its own beats the configuration, and a flag beats both.
    files["chat_template.jinja"] = b"file"
    assert Tokenizer.from_files(files, {}).render(ChatPrompt(messages=[USER])) == "file"
    flagged = Tokenizer.from_files(files, {"chat_template": "{{ 'flag' }}"})
    assert flagged.render(ChatPrompt(messages=[USER])) == "flag"


def test_special_tokens_given_as_objects_or_in_their_own_file() -> None:
    config = json.loads(FILES["tokenizer_config.json"])
    del config["added_tokens_decoder"]
    config["eos_token"] = {"__type": "AddedToken", "content": "<|eos|>", "normalized": True}
    own = {"bos_token": {"content": "<|end|>"}, "unk_token": "<|call|>"}
    files = {
        "tokenizer.json": FILES["tokenizer.json"],
        "tokenizer_config.json": json.dumps(config).encode(),
        "special_tokens_map.json": json.dumps(own).encode(),
    }
    ours = Tokenizer.from_files(
        files, {"chat_template": "{{ bos_token }}{{ eos_token }}{{ unk_token }}"}
    )
    assert ours.render(ChatPrompt(messages=[USER])) == "<|end|><|eos|><|call|>"


def test_tokens_that_only_the_configuration_declares_are_added() -> None:
    config = json.loads(FILES["tokenizer_config.json"])
    config["pad_token"] = "<|pad|>"
    files = {**FILES, "tokenizer_config.json": json.dumps(config).encode()}
    before, after = Tokenizer.from_files(FILES, {}), Tokenizer.from_files(files, {})
    assert len(before.encode_text("a<|pad|>b", False)) > 3
    assert len(after.encode_text("a<|pad|>b", False)) == 3


@pytest.mark.parametrize(
    ("files", "settings", "reason"),
    [
        ({"tokenizer.json": None}, {}, "no tokenizer.json"),
        ({"tokenizer.json": b"{"}, {}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": b"{}"}, {}, "does not load"),
        ({"tokenizer_config.json": b"[]"}, {}, "not a JSON object"),
        ({}, {"tokenizer_mode": "mistral"}, "mistral"),
        ({}, {"chat_template": "missing"}, "not among the served files"),
        ({"tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer"}'}, {}, "rebuilds"),
    ],
)
def test_files_that_give_no_exact_tokenizer(
    files: dict[str, bytes | None], settings: dict[str, str], reason: str
) -> None:
    merged = {name: content for name, content in {**FILES, **files}.items() if content is not None}
    with pytest.raises(NotExact, match=reason):
        Tokenizer.from_files(merged, settings)


def test_models_that_engines_render_themselves() -> None:
    files = {**FILES, "config.json": b'{"model_type": "gpt_oss"}'}
    ours = Tokenizer.from_files(files, {})
    with pytest.raises(NotExact, match="gpt_oss"):
        ours.encode_chat(ChatPrompt(messages=[USER]))
    assert len(ours.encode_text("text still works", True)) > 0


def test_a_model_without_a_template() -> None:
    files = {"tokenizer.json": FILES["tokenizer.json"]}
    with pytest.raises(NotExact, match="no chat template"):
        Tokenizer.from_files(files, {}).encode_chat(ChatPrompt(messages=[USER]))


def test_truncation() -> None:
    ours = tokenizer(max_model_len="100")
    text = "one two three four five six seven eight"
    whole = ours.encode_text(text, False)

    def cut(limit: int, side: str | None) -> list[int]:
        encoding = Encoding(
            add_special_tokens=False, truncate_prompt_tokens=limit, truncation_side=side
        )
        return ours.tokenize(TextPrompts(texts=[text], encoding=encoding))[0].tolist()

    assert cut(3, "left") == whole[-3:].tolist()
    assert cut(3, None) == whole[-3:].tolist()  # as vLLM sets generating models up
    assert cut(3, "right") == whole[:3].tolist()
    assert cut(1000, None) == whole.tolist()
    assert cut(-1, None) == whole.tolist()
    assert cut(0, "left") == []
    text = text * 30
    with pytest.raises(NotExact, match="longer than the model's context"):
        cut(3, "left")
    encoding = Encoding(add_special_tokens=False, truncate_prompt_tokens=-1)
    with pytest.raises(NotExact, match="not known"):
        tokenizer().tokenize(TextPrompts(texts=["a"], encoding=encoding))


def test_given_tokens_are_taken_as_they_are() -> None:
    tokens = tokenizer().tokenize(TokenPrompts(prompts=[[1, 2], [2**32 - 1]]))
    assert [one.tolist() for one in tokens] == [[1, 2], [2**32 - 1]]
    with pytest.raises(NotExact, match="vocabulary"):
        tokenizer().tokenize(TokenPrompts(prompts=[[2**32]]))
