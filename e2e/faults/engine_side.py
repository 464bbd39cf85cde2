"""ASGI middleware for simulated engines: who answers, and which of their answers fail.

Each answer names the engine's process in `x-engine`: an engine that was restarted is another one.
What `$ENGINE_FAULT` (a file) holds happens to /metrics: `503`, `hang`, or nothing while it is
empty. `$KV_SOURCES`, if set, is the answer to /kv_event_sources: a picker listens to what stands
between.
"""

import asyncio
import os
from pathlib import Path
from typing import Any


class Faulty:
    def __init__(self, app: Any) -> None:
        self._app = app
        self._fault = Path(os.environ["ENGINE_FAULT"])
        self._sources = os.environ.get("KV_SOURCES", "").encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path == "/metrics" and (fault := self._fault.read_text()):
            await (answer(send, 503, b"") if fault == "503" else asyncio.sleep(3600))
            return
        if path == "/kv_event_sources" and self._sources:
            await answer(send, 200, self._sources)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-engine", b"%d" % os.getpid())]
            await send(message)

        await self._app(scope, receive, sending)


async def answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
