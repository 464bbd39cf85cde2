"""`dynamo chat` as a user types it: on a terminal, in a pipe, and interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

DYNAMO = Path(sys.executable).parent / "dynamo"


class Model:
    """Repeats the last message word by word; "wait" makes it wait for ever after its first word."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.models = ["parrot"]
        self.app = web.Application()
        self.app.router.add_get("/v1/models", self.list)
        self.app.router.add_post("/v1/chat/completions", self.chat)

    async def list(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body["messages"])
        text = body["messages"][-1]["content"]
        if text == "refuse":
            return web.json_response({"error": {"message": "not today"}}, status=503)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for word in text.split():
            chunk = {"choices": [{"delta": {"content": f"<{word}>"}}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            if text.startswith("wait"):
                await asyncio.get_running_loop().create_future()
        if text != "break":
            await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def served(model: Model) -> AsyncIterator[str]:
    runner = web.AppRunner(model.app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def run(arguments: Sequence[str], stdin: bytes = b"") -> tuple[int | None, str, str]:
    """(exit status, stdout, stderr) of `dynamo chat ARGUMENTS` in a pipe."""
    process = await asyncio.create_subprocess_exec(
        DYNAMO,
        "chat",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin), 30)
    return process.returncode, out.decode(), err.decode()


async def test_one_message_and_standard_input() -> None:
    async with served(model := Model()) as url:
        assert await run(["--url", url, "hello there"]) == (0, "<hello><there>\n", "")
        assert await run(["--url", url, "--system", "be brief"], b"piped\n") == (0, "<piped>\n", "")
    assert model.asked[1] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "piped"},
    ]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("refuse", "answered 503: not today"),
        ("break", "the answer broke off before its end"),
        ("", "standard input is empty"),
    ],
)
async def test_what_goes_wrong_is_one_line_and_status_1(message: str, error: str) -> None:
    async with served(Model()) as url:
        status, _, stderr = await run(["--url", url, *([message] if message else [])])
    assert status == 1
    assert error in stderr
    assert stderr.count("\n") == 1


async def test_no_model_no_server_and_no_url() -> None:
    model = Model()
    model.models = []
    async with served(model) as url:
        assert "serves no model yet" in (await run(["--url", url, "hi"]))[2]
        assert (
            "/nowhere/v1/models answered 404" in (await run(["--url", f"{url}/nowhere", "hi"]))[2]
        )
    assert "Cannot connect" in (await run(["--url", "http://127.0.0.1:1", "hi"]))[2]
    for wrong in ("localhost", "ftp://localhost"):
        assert "is no URL such as http://HOST:8000" in (await run(["--url", wrong, "hi"]))[2]


class Terminal:
    """`dynamo chat` on a terminal of its own; keys go in, the screen comes out."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.screen = ""

    async def __aenter__(self) -> Terminal:
        self._keys, theirs = pty.openpty()
        self._process = await asyncio.create_subprocess_exec(
            DYNAMO,
            "chat",
            "--url",
            self._url,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            # The terminal is the process's own, so that its keys make signals.
            preexec_fn=lambda: os.login_tty(theirs),
        )
        os.close(theirs)
        self._moved = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._keys, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        asyncio.get_running_loop().remove_reader(self._keys)
        os.close(self._keys)

    def _read(self) -> None:
        try:
            self.screen += os.read(self._keys, 4096).decode(errors="replace")
        except OSError:  # the other end has closed
            asyncio.get_running_loop().remove_reader(self._keys)
        self._moved.set()

    async def until(self, text: str, times: int = 1) -> None:
        async with asyncio.timeout(30):
            while self.screen.count(text) < times:
                self._moved.clear()
                await self._moved.wait()

    def press(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    async def press_until_ended(self, keys: str) -> int:
        for _ in range(10):
            self.press(keys)
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self._process.wait(), 2)
        raise AssertionError(f"still running: {self.screen!r}")

    async def ended(self) -> int:
        return await asyncio.wait_for(self._process.wait(), 10)


async def test_a_conversation_goes_on_after_errors_and_interrupted_answers() -> None:
    async with served(model := Model()) as url, Terminal(url) as terminal:
        await terminal.until("> ")
        terminal.press("refuse\n")
        await terminal.until("not today")
        await terminal.until("> ", times=2)
        terminal.press("wait for it\n")
        await terminal.until("<wait>")
        terminal.press("\x03")
        await terminal.until("\n> ", times=3)
        terminal.press("done\n")
        await terminal.until("<done>")
        await terminal.until("\n> ", times=4)
        terminal.press("\x04")
        assert await terminal.ended() == 0
    assert [m["content"] for m in model.asked[-1]] == ["wait for it", "<wait>", "done"]


async def test_ctrl_c_at_the_prompt_ends_at_once() -> None:
    async with served(Model()) as url, Terminal(url) as terminal:
        await terminal.until("> ")
        # Python misses a signal that comes between its showing a prompt and its reading a line.
        assert await terminal.press_until_ended("\x03") == 128 + signal.SIGINT
