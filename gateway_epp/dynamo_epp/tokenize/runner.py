"""Running templates and tokenizers beside the event loop, with a deadline.

A chat template is a program that came with a model and runs on what clients send. Most are bounded
by their syntax and take a fraction of a millisecond: for small prompts those run in place, since a
hand-over to a thread costs more. All others, and all large prompts, run in a thread; one that
exceeds its deadline is stopped, its thread replaced, and that model's template not run again.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from dynamo_epp.requests import ChatPrompt, Prompt, TokenPrompts
from dynamo_epp.tokenize.exact import NotExact
from dynamo_epp.tokenize.segments import Tokens
from dynamo_epp.tokenize.tokenizer import Tokenizer, tokenize_ids

logger = logging.getLogger(__name__)

INLINE_CHARACTERS = 64_000
"""Largest conversation (characters of content) rendered in place, if its template is bounded."""
INLINE_NEW_CHARACTERS = 2_000
"""Most characters tokenized in place; about 1 ms of work."""


class _Stopped(BaseException):
    """Raised inside a thread whose task ran out of time; templates cannot catch it."""


class _Task:
    def __init__(self, work: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.started: asyncio.Future[None] = loop.create_future()
        self.thread: _Thread | None = None
        self.done = False

    def resolve(self, value: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(value)
        else:
            self.future.set_exception(error)


class _Thread(threading.Thread):
    """A daemon, so that a template that never ends cannot keep the process from ending."""

    def __init__(self, tasks: queue.SimpleQueue[_Task | None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._tasks = tasks
        self.abandoned = False

    def run(self) -> None:
        while not self.abandoned:
            task = self._tasks.get()
            if task is None:
                return
            self._work(task)

    def _work(self, task: _Task) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            task.thread = self
            if not _post(task.loop, _begin, task.started):
                return
            value = task.work()
        except _Stopped:
            error = TimeoutError()
        except BaseException as raised:
            error = raised
        task.done = True
        _post(task.loop, task.resolve, value, error)

    def stop(self) -> None:
        """Raise in the thread; it takes effect at the next Python instruction it executes."""
        self.abandoned = True
        if self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(_Stopped)
            )


def _begin(started: asyncio.Future[None]) -> None:
    if not started.done():
        started.set_result(None)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> bool:
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:  # the loop is closed: nobody waits any more
        return False
    return True


class TokenizeThreads:
    """A few threads for work that must neither block the loop nor outlive its deadline.

    ``replaced`` counts threads given up on.
    """

    def __init__(self, threads: int = 2) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: set[_Thread] = set()
        self.replaced = 0
        for _ in range(threads):
            self._start()

    def _start(self) -> None:
        thread = _Thread(self._tasks, f"tokenize-{self.replaced}-{len(self._threads)}")
        self._threads.add(thread)
        thread.start()

    async def run(self, work: Callable[[], Any], deadline_s: float) -> Any:
        """The result of ``work``, or `TimeoutError` when it runs longer than ``deadline_s``.

        The deadline counts from the moment a thread takes the work up; waiting for a thread is
        bounded by the same time again.
        """
        task = _Task(work, asyncio.get_running_loop())
        self._tasks.put(task)
        try:
            async with asyncio.timeout(deadline_s):
                await task.started
        except TimeoutError:
            task.work = _nothing
            raise NotExact("all tokenizing threads are busy") from None
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.shield(task.future)
        except TimeoutError:
            self._give_up(task)
            raise

    def _give_up(self, task: _Task) -> None:
        thread = task.thread
        if thread is None or task.done or thread not in self._threads:
            return
        self._threads.remove(thread)
        thread.stop()
        self.replaced += 1
        self._start()

    def close(self) -> None:
        """Let idle threads end. Does not wait: a stuck one would hold up the shutdown."""
        for _ in self._threads:
            self._tasks.put(None)
        self._threads.clear()


def _nothing() -> None:
    """In place of work that nobody waits for."""


class LocalTokenizer:
    """One model's `Tokenizer` behind the interface that the picker uses; one loop only.

    ``deadline_s`` bounds rendering and tokenizing of one prompt off the loop. A prompt that takes
    longer disables the model's template: chats are `NotExact` from then on, plain text is not
    affected.
    """

    def __init__(
        self, tokenizer: Tokenizer, threads: TokenizeThreads, *, deadline_s: float = 2.0
    ) -> None:
        self.tokenizer = tokenizer
        self._threads = threads
        self._deadline = deadline_s
        self.inline = 0
        self.threaded = 0

    @property
    def template_disabled(self) -> str:
        """Why chats are not rendered any more; empty while they are."""
        return self.tokenizer.template_disabled

    async def tokenize(self, prompt: Prompt) -> list[Tokens]:
        """Tokens of each prompt, uint32. Raises `NotExact`."""
        if isinstance(prompt, TokenPrompts):
            return tokenize_ids(prompt)
        if isinstance(prompt, ChatPrompt):
            return [await self._chat(prompt)]
        if sum(map(len, prompt.texts)) <= INLINE_NEW_CHARACTERS:
            self.inline += 1
            return self.tokenizer.tokenize(prompt)
        self.threaded += 1
        try:
            # Time in proportion to the text, by a library without loops on its content.
            deadline = self._deadline + sum(map(len, prompt.texts)) * 2e-6
            return await self._threads.run(lambda: self.tokenizer.tokenize(prompt), deadline)  # type: ignore[no-any-return]
        except TimeoutError:
            raise NotExact("tokenizing took too long") from None

    async def _chat(self, prompt: ChatPrompt) -> Tokens:
        tokenizer = self.tokenizer
        template = tokenizer.template(prompt)
        if template.bounded and _characters(prompt) <= INLINE_CHARACTERS:
            text = tokenizer.render(prompt)
            plain = not prompt.encoding.add_special_tokens
            if (tokenizer.uncached(text) if plain else len(text)) <= INLINE_NEW_CHARACTERS:
                self.inline += 1
                return tokenizer.encode_rendered(text, prompt.encoding)
            work: Callable[[], Tokens] = lambda: tokenizer.encode_rendered(text, prompt.encoding)  # noqa: E731
            renders = False
        else:
            work = lambda: tokenizer.encode_chat(prompt)  # noqa: E731
            renders = True
        self.threaded += 1
        try:
            return await self._threads.run(work, self._deadline)  # type: ignore[no-any-return]
        except TimeoutError:
            if renders:
                reason = f"the chat template ran longer than {self._deadline:g} s and is not used"
                if not tokenizer.template_disabled:
                    logger.error("%s any more", reason)
                tokenizer.template_disabled = reason
                raise NotExact(reason) from None
            raise NotExact("tokenizing took too long") from None


def _characters(prompt: ChatPrompt) -> int:
    total = 0
    for message in prompt.messages:
        content = message.get("content")
        if isinstance(content, str):
            total += len(content)
        elif isinstance(content, list):
            total += sum(len(part) for part in content if isinstance(part, str))
            total += sum(
                len(str(part.get("text", ""))) for part in content if isinstance(part, dict)
            )
    return total + 1000 * len(prompt.tools or ())
