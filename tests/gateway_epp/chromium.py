"""A headless Chromium that a test can ask things, over the DevTools protocol on loopback."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # tests run as root, in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    # Nothing but loopback.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-address=127.0.0.1",
    "--remote-debugging-port=0",
)
START_S = 60.0


@dataclass
class Page:
    """One tab."""

    socket: aiohttp.ClientWebSocketResponse
    problems: list[str] = field(default_factory=list)
    """Exceptions and errors on the console, violations of the page's policy among them."""
    _calls: int = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        number = self._calls
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(message["params"]))
            if message.get("method") == "Log.entryAdded":
                entry = message["params"]["entry"]
                if entry["level"] == "error" and "favicon" not in entry.get("url", ""):
                    self.problems.append(entry["text"])

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until a JavaScript condition holds, looking at every change of the page."""
        await self.evaluate(
            f"""new Promise((done, failed) => {{
              const look = () => {{ if ({condition}) {{ watch.disconnect(); done(); }} }};
              const watch = new MutationObserver(look);
              watch.observe(document, {{subtree: true, childList: true, attributes: true,
                                       characterData: true}});
              setTimeout(() => failed(new Error("not in time: " + {condition!r})), 20000);
              look();
            }})"""
        )


@asynccontextmanager
async def opened(url: str, profile: Path) -> AsyncIterator[Page]:
    """``url`` in a fresh browser whose files are in ``profile``."""
    assert PROGRAM is not None
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *ARGUMENTS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
            tabs = await _tabs(process, session)
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                await page.call("Runtime.enable")
                await page.call("Log.enable")
                await page.call("Page.enable")
                await page.call("Page.navigate", url=url)
                await page.until("document.readyState === 'complete'")
                yield page
    finally:
        process.terminate()
        await process.communicate()


async def _tabs(
    process: asyncio.subprocess.Process, session: aiohttp.ClientSession
) -> list[dict[str, Any]]:
    """The browser tells on stderr where it listens."""
    assert process.stderr is not None
    async for line in process.stderr:
        if b"DevTools listening on ws://" in line:
            host = line.decode().split("ws://")[1].split("/")[0]
            async with session.get(f"http://{host}/json") as answer:
                tabs: list[dict[str, Any]] = await answer.json()
                return tabs
    raise AssertionError("the browser ended without a word")
