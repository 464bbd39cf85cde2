"""Templates and tokenizers beside the loop: in place when cheap, in threads with a deadline."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from dynamo_epp.requests import ChatPrompt, TextPrompts, TokenPrompts
from dynamo_epp.tokenize import LocalTokenizer, NotExact, Tokenizer, TokenizeThreads, TooCostly
from dynamo_epp.tokenize.runner import INLINE_MESSAGES
from dynamo_workers.tiny import TOKENIZER_FILES, TOKENIZER_FOLDER

FILES = {name: (TOKENIZER_FOLDER / name).read_bytes() for name in TOKENIZER_FILES}
PROMPT = ChatPrompt(messages=[{"role": "user", "content": "hi"}])
# 100,000 times 100,000 iterations: hours.
ENDLESS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"


@pytest.fixture
def threads() -> Iterator[TokenizeThreads]:
    threads = TokenizeThreads(1)
    yield threads
    threads.close()


def local(threads: TokenizeThreads, template: str = "", deadline_s: float = 5.0) -> LocalTokenizer:
    settings = {"chat_template": template} if template else {}
    return LocalTokenizer(Tokenizer.from_files(FILES, settings), threads, deadline_s=deadline_s)


async def test_small_prompts_run_in_place(threads: TokenizeThreads) -> None:
    ours = local(threads)
    (tokens,) = await ours.tokenize(PROMPT)
    assert tokens.tolist() == ours.tokenizer.encode_chat(PROMPT).tolist()
    await ours.tokenize(TextPrompts(texts=["a"]))
    assert [one.tolist() for one in await ours.tokenize(TokenPrompts(prompts=[[5]]))] == [[5]]
    assert (ours.inline, ours.threaded) == (2, 0)


async def test_large_prompts_run_in_threads(threads: TokenizeThreads) -> None:
    ours = local(threads)
    long = "some words " * 3000
    (tokens,) = await ours.tokenize(TextPrompts(texts=[long]))
    assert tokens.tolist() == ours.tokenizer.encode_text(long, True).tolist()
    chat = ChatPrompt(messages=[{"role": "user", "content": long}])
    (tokens,) = await ours.tokenize(chat)
    assert tokens.tolist() == ours.tokenizer.encode_chat(chat).tolist()
    assert (ours.inline, ours.threaded) == (0, 2)
    await ours.tokenize(chat)  # every stretch is kept by now
    assert (ours.inline, ours.threaded) == (1, 2)
    many = ChatPrompt(messages=[{"role": "user", "content": "a"}] * (INLINE_MESSAGES + 1))
    await ours.tokenize(many)
    assert ours.threaded == 3


async def test_templates_that_may_not_end_run_in_threads(threads: TokenizeThreads) -> None:
    ours = local(threads, "{% for i in range(3) %}{{ i }}{% endfor %}")
    await ours.tokenize(PROMPT)
    assert ours.threaded == 1


def pool_of_one() -> tuple[TokenizeThreads, threading.Thread]:
    before = set(threading.enumerate())
    threads = TokenizeThreads(1)
    (thread,) = set(threading.enumerate()) - before
    return threads, thread


async def test_a_runaway_template_is_stopped_and_not_run_again() -> None:
    threads, stuck = pool_of_one()
    runaway, other = local(threads, ENDLESS, deadline_s=0.05), local(threads)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    with pytest.raises(NotExact, match=r"ran longer than 0\.05 s"):
        await runaway.tokenize(PROMPT)
    ticking.cancel()
    assert ticks > 0  # the loop went on
    assert threads.replaced == 1
    started = time.monotonic()
    with pytest.raises(NotExact, match="not used any more"):
        await runaway.tokenize(PROMPT)
    assert time.monotonic() - started < 0.04
    assert "not used any more" in runaway.template_disabled
    # Plain text of the same model, and other models on the same pool, are not affected.
    await runaway.tokenize(TextPrompts(texts=["words " * 3000]))
    await other.tokenize(TextPrompts(texts=["words " * 3000]))
    # The stuck thread ends in the middle of its loops.
    await asyncio.to_thread(stuck.join, 10)
    assert not stuck.is_alive()
    threads.close()


async def test_a_runaway_template_is_stopped_though_its_caller_left() -> None:
    threads, stuck = pool_of_one()
    runaway = local(threads, ENDLESS, deadline_s=0.2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(runaway.tokenize(PROMPT), 0.1)
    await asyncio.to_thread(stuck.join, 10)
    assert not stuck.is_alive()
    threads.close()
    assert threads.replaced == 1
    assert runaway.template_disabled


async def test_one_large_chat_does_not_disable_the_template() -> None:
    # Two messages make two iterations, a thousand make a million times a thousand.
    many_loops = (
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}"
        "{% endfor %}{% endfor %}{% endfor %}{{ messages|length }}"
    )
    threads, stuck = pool_of_one()
    ours = local(threads, many_loops, deadline_s=0.2)
    message = {"role": "user", "content": "hi"}
    huge = ChatPrompt(messages=[message] * 2000, body_bytes=70_000)
    with pytest.raises(TooCostly):
        await ours.tokenize(huge)
    await asyncio.to_thread(stuck.join, 10)
    assert not ours.template_disabled
    await ours.tokenize(PROMPT)
    await ours.tokenize(ChatPrompt(messages=[message], body_bytes=69_999))
    # The next one as large costs nothing.
    started = time.monotonic()
    with pytest.raises(TooCostly, match="70000 bytes"):
        await ours.tokenize(huge)
    assert time.monotonic() - started < 0.15
    assert threads.replaced == 1
    threads.close()


async def test_what_the_engine_refuses_for_its_length_is_not_tokenized(
    threads: TokenizeThreads,
) -> None:
    ours = LocalTokenizer(Tokenizer.from_files(FILES, {"max_model_len": "8"}), threads)
    await ours.tokenize(TextPrompts(texts=["words " * 10]))  # too long, but it takes tokens to know
    for prompt in (
        TextPrompts(texts=["words " * 3000]),
        ChatPrompt(messages=[{"role": "user", "content": "words " * 3000}]),
    ):
        with pytest.raises(TooCostly, match="more than the model's context"):
            await ours.tokenize(prompt)


async def test_prompts_do_not_queue_for_long(threads: TokenizeThreads) -> None:
    gate = threading.Event()
    blocking = asyncio.create_task(threads.run(gate.wait, 30))
    await asyncio.sleep(0)
    with pytest.raises(NotExact, match="busy"):
        await threads.run(lambda: 1, 30)
    gate.set()
    assert await blocking
    assert await threads.run(lambda: 2, 30) == 2
    assert threads.replaced == 0


async def test_errors_come_back(threads: TokenizeThreads) -> None:
    ours = local(threads, "{% for i in range(1) %}{{ raise_exception('no') }}{% endfor %}")
    with pytest.raises(NotExact, match="no"):
        await ours.tokenize(PROMPT)
    assert not ours.template_disabled
