"""Chat rendering and the answers, without a server."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dynamo_workers.sim.answers import LONGEST, SHORTEST, AnswerBook
from dynamo_workers.sim.chat import ModelFolderError, Renderer
from dynamo_workers.sim.errors import RequestError
from dynamo_workers.sim.server import SettingsError, build, parser, with_dashes
from dynamo_workers.tiny import TOKENIZER_FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

PLAIN_STRINGS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def bundled() -> Renderer:
    return Renderer(TOKENIZER_FOLDER)


@pytest.fixture(scope="module")
def strings() -> Renderer:
    return Renderer(TOKENIZER_FOLDER, template=PLAIN_STRINGS)


@pytest.fixture(scope="module")
def book(bundled: Renderer) -> AnswerBook:
    return AnswerBook("tiny", bundled)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


TWO_PARTS = user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    ],
}


def test_turns_and_generation_prompt(bundled: Renderer):
    messages = [{"role": "developer", "content": "be brief"}, user("hello\n")]
    prompt = "<|bos|><|system|>be brief<|end|><|user|>hello\n<|end|>"
    assert bundled.render({"messages": messages}) == prompt + "<|assistant|>"
    assert bundled.render({"messages": messages, "add_generation_prompt": False}) == prompt


def test_parts_are_joined_as_the_template_needs_it(bundled: Renderer, strings: Renderer):
    assert (bundled.content_format, strings.content_format) == ("openai", "string")
    assert "<|user|>ab<|end|>" in bundled.render({"messages": [TWO_PARTS]})
    assert "<|user|>a\nb<|end|>" in strings.render({"messages": [TWO_PARTS]})


def test_developer_becomes_system_where_the_template_does_not_know_it(strings: Renderer):
    messages = [
        {"role": "system", "content": "s"},
        user("x"),
        {"role": "developer", "content": "d"},
    ]
    text = strings.render({"messages": messages})
    assert text == "<|system|>s\n\nd<|end|><|user|>x<|end|><|assistant|>"


def test_tools_get_the_fields_that_they_lack(bundled: Renderer):
    tools = [{"type": "function", "function": {"strict": True, "name": "f"}}]
    text = bundled.render({"messages": [user("x")], "tools": tools})
    shown = json.loads(text.partition("\n")[2].partition("<|end|>")[0])
    assert list(shown["function"]) == ["name", "description", "parameters", "strict"]
    assert (shown["function"]["description"], shown["function"]["parameters"]) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [('{"x": "é"}', '{"x": "é"}'), ("{oops", "{}"), ("[1]", "{}"), (None, "{}"), ("", "{}")],
)
def test_arguments_of_calls_become_objects(bundled: Renderer, arguments: Any, shown: str):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [user("x"), {"role": "assistant", "tool_calls": [call]}]
    text = bundled.render({"messages": messages})
    assert '<|assistant|><|call|>{"name": "f", "arguments": ' + shown + "}<|end|>" in text


def test_results_of_tools_are_joined_by_lines(bundled: Renderer):
    result = {"role": "tool", "tool_call_id": "1", "content": TWO_PARTS["content"]}
    text = bundled.render({"messages": [user("x"), CALLS, result]})
    assert text.endswith("<|tool|>a\nb<|end|><|assistant|>")


def test_the_final_message_is_continued(bundled: Renderer):
    messages = [user("x"), {"role": "assistant", "content": "The answer is "}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    assert bundled.render(body) == "<|bos|><|user|>x<|end|><|assistant|>The answer is "
    with pytest.raises(RequestError, match="Cannot set both"):
        bundled.render({**body, "add_generation_prompt": True})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": "x"}, "must be a list"),
        ({"messages": [{"content": "x"}]}, "object with a role"),
        ({"messages": [user(3)]}, "string, a list of parts or null"),
        ({"messages": [user([{"type": "image_url"}])]}, "'image_url'"),
        ({"messages": [user("x")], "tools": [{}]}, "function with a name"),
        ({"messages": [user("x")], "chat_template": "{{ 1 }}"}, "untrusted chat template"),
        ({"messages": [user("x")], "chat_template_kwargs": []}, "must be an object"),
    ],
)
def test_what_cannot_be_rendered_is_refused(bundled: Renderer, body: dict[str, Any], words: str):
    with pytest.raises(RequestError, match=words):
        bundled.render(body)


@pytest.mark.parametrize("template", ["{{ messages.__class__.__mro__ }}", "{{ messages.clear() }}"])
def test_templates_are_sandboxed(template: str):
    with pytest.raises(RequestError, match=r"unsafe|not safely callable"):
        Renderer(TOKENIZER_FOLDER, template=template).render({"messages": [user("x")]})


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json"):
        Renderer(tmp_path)
    shutil.copy(TOKENIZER_FOLDER / "tokenizer.json", tmp_path)
    with pytest.raises(RequestError, match="no chat template"):
        Renderer(tmp_path).render({"messages": [user("x")]})


# --- answers --------------------------------------------------------------------------------------

prompts = st.lists(st.integers(0, 3000), min_size=1, max_size=50)


@settings(max_examples=30, deadline=None)
@given(prompt=prompts, limit=st.integers(1, 300))
def test_answers_end_by_themselves_and_limits_give_prefixes(
    book: AnswerBook, bundled: Renderer, prompt: list[int], limit: int
):
    whole = book.answer(prompt, max_tokens=1000)
    assert (whole.finish_reason, whole.tokens[-1]) == ("stop", bundled.end_id)
    assert SHORTEST <= len(whole.tokens) <= LONGEST
    cut = book.answer(prompt, max_tokens=limit)
    assert cut.tokens == whole.tokens[:limit]
    assert cut.finish_reason == ("stop" if limit >= len(whole.tokens) else "length")
    forced = book.answer(prompt, max_tokens=limit, ignore_eos=True)
    assert (len(forced.tokens), forced.finish_reason) == (limit, "length")


@settings(max_examples=30, deadline=None)
@given(prompt=prompts)
def test_the_text_of_an_answer_encodes_to_its_tokens(
    book: AnswerBook, bundled: Renderer, prompt: list[int]
):
    answer = book.answer(prompt, max_tokens=1000)
    text = "".join(answer.pieces)
    assert bundled.encode(text, special=False) == answer.tokens[:-1]
    assert bundled.decode(answer.tokens, skip_special=True) == text


def test_answers_depend_on_model_prompt_and_index_alone(bundled: Renderer, book: AnswerBook):
    def words(maker: AnswerBook, prompt: list[int], index: int = 0) -> list[int]:
        return maker.answer(prompt, max_tokens=20, index=index).tokens

    assert words(AnswerBook("tiny", bundled), [1, 2]) == words(book, [1, 2])
    different = [
        words(book, [1, 2]),
        words(book, [2, 1]),
        words(book, [1, 2], index=1),
        words(AnswerBook("other", bundled), [1, 2]),
    ]
    assert len({tuple(tokens) for tokens in different}) == 4


@settings(max_examples=30, deadline=None)
@given(prompt=prompts, at=st.integers(0, 15), length=st.integers(1, 12), include=st.booleans())
def test_stop_strings_cut_where_the_text_first_has_them(
    book: AnswerBook, prompt: list[int], at: int, length: int, include: bool
):
    text = "".join(book.answer(prompt, max_tokens=20, ignore_eos=True).pieces)
    word = text[at : at + length]
    answer = book.answer(prompt, max_tokens=20, ignore_eos=True, stop=[word], include_stop=include)
    before = text[: text.index(word)]
    assert "".join(answer.pieces) == (before + word if include else before)
    assert (answer.finish_reason, answer.stop_reason) == ("stop", word)
    assert len(answer.pieces) == len(answer.tokens)


def test_stop_tokens_end_an_answer_and_are_counted(book: AnswerBook):
    free = book.answer([1], max_tokens=20, ignore_eos=True)
    stopped = book.answer([1], max_tokens=20, ignore_eos=True, stop_token_ids=[free.tokens[5]])
    assert stopped.tokens == free.tokens[:6]
    assert (stopped.stop_reason, stopped.pieces[-1]) == (free.tokens[5], "")


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kv-events-config", '{"endpont": "x"}'], "--kv-events-config: Object contains unknown"),
        (["--kv-events-config", '{"publisher": "nats"}'], "use zmq or null"),
        (["--max-model-len", "100000"], "needs 6250 blocks of 16 tokens, but the pool has 4096"),
        (["--timing-profile", "/nowhere.json"], "/nowhere.json"),
        (["--tokenizer", "/nowhere"], "/nowhere: no tokenizer.json there"),
        (["--chat-template", "/nowhere.jinja"], "--chat-template /nowhere.jinja"),
        (["--middleware", "json.nothing"], "--middleware json.nothing"),
        (["--middleware", "nothing"], "module.Name is expected"),
        (["--middleware", "json.JSONDecodeError.nothing"], "--middleware json"),
    ],
)
def test_flags_that_cannot_be_used_are_named(flags: list[str], words: str):
    with pytest.raises(SettingsError) as refused:
        build(parser().parse_args(flags))
    assert words in str(refused.value)


def test_numbers_out_of_range_are_refused_by_the_parser(capsys: pytest.CaptureFixture[str]):
    for flags, words in (
        (["--port", "70000"], "a port is from 0 to 65535"),
        (["--block-size", "0"], "at least 1 is expected"),
        (["--speed", "-1"], "a number of at least 0"),
        (["--enforce-eagre"], "unrecognized arguments: --enforce-eagre"),
    ):
        with pytest.raises(SystemExit) as ended:
            parser().parse_args(flags)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_flags_may_be_written_with_underscores():
    argv = ["--served_model_name", "a_b", "--max_model_len=512", "--no_enable_prefix_caching"]
    arguments = parser().parse_args(with_dashes(argv))
    assert arguments.served_model_name == ["a_b"]
    assert (arguments.max_model_len, arguments.enable_prefix_caching) == (512, False)
