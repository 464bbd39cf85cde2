"""Running templates and tokenizers beside the event loop, with a deadline.

A chat template is a program that came with a model and runs on what clients send. Most are bounded
by their syntax and take a fraction of a millisecond: for small prompts those run in place, since a
hand-over to a thread costs more. All others, and all large prompts, run in a thread; one that
exceeds its deadline is stopped and its thread replaced. If the prompt was small, the template is
at fault and not run again. If it was large, only chats as large are not rendered for a while: a
client that sends hundreds of thousands of messages must not decide how others are routed.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from dynamo_epp.requests import ChatPrompt, Prompt, TokenPrompts
from dynamo_epp.tokenize.exact import NotExact, TooCostly
from dynamo_epp.tokenize.segments import Tokens
from dynamo_epp.tokenize.tokenizer import Tokenizer, tokenize_ids

logger = logging.getLogger(__name__)

INLINE_BYTES = 64_000
"""Largest request whose chat is rendered in place, if its template is bounded."""
INLINE_MESSAGES = 128
"""Most messages of such a chat: a bounded template may loop over them within a loop over them."""
INLINE_NEW_CHARACTERS = 2_000
"""Most characters tokenized in place; about 1 ms of work."""
LARGE_PAUSE_S = 60.0
"""How long chats as large as one that took too long are not rendered."""
QUEUE_WAIT_S = 0.5
"""How long a prompt waits for a thread before it is routed by load instead."""


class _Stopped(BaseException):
    """Raised inside a thread whose task ran out of time; templates cannot catch it."""


class _Task:
    """Work for a thread. All but ``work`` and ``done`` belong to the loop."""

    def __init__(
        self,
        work: Callable[[], Any],
        deadline_s: float,
        expired: Callable[[_Task], None],
    ) -> None:
        self.work = work
        self.done = False
        self.thread: _Thread | None = None
        self.loop = asyncio.get_running_loop()
        self.started = asyncio.Event()
        self.result: asyncio.Future[Any] = self.loop.create_future()
        self.result.add_done_callback(self._ended)
        self._deadline = deadline_s
        self._expired = expired
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, thread: _Thread) -> None:
        self.thread = thread
        self.started.set()
        if not self.result.done():
            self._timer = self.loop.call_later(self._deadline, self._expired, self)

    def resolve(self, value: Any, error: BaseException | None) -> None:
        if self.result.done():
            return
        if error is None:
            self.result.set_result(value)
        else:
            self.result.set_exception(error)

    def _ended(self, result: asyncio.Future[Any]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not result.cancelled():
            result.exception()  # seen, even if the caller is gone


class _Thread(threading.Thread):
    """A daemon, so that a template that never ends cannot keep the process from ending."""

    def __init__(self, tasks: queue.SimpleQueue[_Task | None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._tasks = tasks
        self._stopping: _Task | None = None

    def run(self) -> None:
        try:
            while self._stopping is None:
                task = self._tasks.get()
                if task is None:
                    return
                self._work(task)
        except _Stopped:  # it came after its task had ended
            return

    def _work(self, task: _Task) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            if not _post(task.loop, task.begin, self):
                return
            value = task.work()
        except _Stopped:
            late = self._stopping is not task
            error = NotExact("tokenizing was interrupted") if late else TimeoutError()
        except BaseException as raised:
            error = raised
        task.done = True
        _post(task.loop, task.resolve, value, error)

    def stop(self, task: _Task) -> None:
        """Raise in the thread; it takes effect at the next Python instruction it executes."""
        self._stopping = task
        if self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(_Stopped)
            )


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

    async def run(
        self,
        work: Callable[[], Any],
        deadline_s: float,
        on_timeout: Callable[[], None] | None = None,
    ) -> Any:
        """The result of ``work``, or `TimeoutError` when it runs longer than ``deadline_s``.

        Then ``on_timeout`` was called, too, even if the caller was cancelled meanwhile. Raises
        `NotExact` if no thread takes the work up within half a second.
        """

        def expired(task: _Task) -> None:
            if task.done:
                return
            self._give_up(task)
            task.resolve(None, TimeoutError())
            if on_timeout is not None:
                on_timeout()

        task = _Task(work, deadline_s, expired)
        self._tasks.put(task)
        try:
            async with asyncio.timeout(QUEUE_WAIT_S):
                await task.started.wait()
        except TimeoutError:
            raise TooCostly("all tokenizing threads are busy") from None
        finally:
            if not task.started.is_set():
                task.work = _nothing
        return await asyncio.shield(task.result)

    def _give_up(self, task: _Task) -> None:
        thread = task.thread
        if thread not in self._threads:
            return
        self._threads.remove(thread)
        thread.stop(task)
        self.replaced += 1
        self._start()

    def close(self) -> None:
        """Let idle threads end. Does not wait: a stuck one would hold up the shutdown."""
        for _ in self._threads:
            self._tasks.put(None)
        self._threads.clear()


def _nothing() -> None:
    """In place of work that nobody waits for."""


_LONG_TEXT_S = 5e-6  # seconds a character, ten times what it takes on an idle core

T = TypeVar("T")


class LocalTokenizer:
    """One model's `Tokenizer` behind the interface that the picker uses; one loop only.

    ``deadline_s`` bounds the rendering of one chat. A small one that takes longer disables the
    model's template: chats are `NotExact` from then on, plain text is not affected. ``inline`` and
    ``threaded`` count where the work was done.
    """

    def __init__(
        self, tokenizer: Tokenizer, threads: TokenizeThreads, *, deadline_s: float = 2.0
    ) -> None:
        self.tokenizer = tokenizer
        self._threads = threads
        self._deadline = deadline_s
        self._too_large = 0  # bytes; chats of at least so many are not rendered…
        self._too_large_until = 0.0  # …until then, in the loop's seconds
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
        size = sum(map(len, prompt.texts))
        if size <= INLINE_NEW_CHARACTERS:
            self.inline += 1
            return self.tokenizer.tokenize(prompt)
        # Time in proportion to the text, by a library that loops over nothing else.
        return await self._run(
            partial(self.tokenizer.tokenize, prompt), self._deadline + size * _LONG_TEXT_S
        )

    async def _chat(self, prompt: ChatPrompt) -> Tokens:
        tokenizer = self.tokenizer
        template = tokenizer.template(prompt)
        small = prompt.body_bytes <= INLINE_BYTES and len(prompt.messages) <= INLINE_MESSAGES
        if not small:
            self._check_size(prompt)
        if not (template.bounded and small):
            render = partial(tokenizer.render, prompt)
            too_slow = self._disable if small else partial(self._pause, prompt.body_bytes)
            text: str = await self._run(render, self._deadline, too_slow)
        else:
            text = tokenizer.render(prompt)
        cost = len(text)
        if cost > INLINE_NEW_CHARACTERS and not prompt.encoding.add_special_tokens:
            cost = tokenizer.uncached(text)
        if cost <= INLINE_NEW_CHARACTERS:
            self.inline += 1
            return tokenizer.encode_rendered(text, prompt.encoding)
        encode = partial(tokenizer.encode_rendered, text, prompt.encoding)
        return await self._run(encode, self._deadline + len(text) * _LONG_TEXT_S)

    async def _run(
        self,
        work: Callable[[], T],
        deadline_s: float,
        on_timeout: Callable[[], None] | None = None,
    ) -> T:
        self.threaded += 1
        try:
            return cast(T, await self._threads.run(work, deadline_s, on_timeout))
        except TimeoutError:
            raise TooCostly(self.template_disabled or "tokenizing took too long") from None

    def _check_size(self, prompt: ChatPrompt) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._too_large_until and prompt.body_bytes >= self._too_large:
            raise TooCostly(f"a chat of {self._too_large} bytes took too long to render")

    def _pause(self, body_bytes: int) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._too_large_until or body_bytes < self._too_large:
            self._too_large = body_bytes
        self._too_large_until = now + LARGE_PAUSE_S
        logger.warning(
            "a chat of %d bytes took longer than %g s to render; for %g s chats as large "
            "are routed by load",
            body_bytes,
            self._deadline,
            LARGE_PAUSE_S,
        )

    def _disable(self) -> None:
        reason = f"the chat template ran longer than {self._deadline:g} s and is not used any more"
        logger.error("%s", reason)
        self.tokenizer.template_disabled = reason
