"""ASGI middleware for simulated engines under load tests: what came in, what went out.

Appends one line per inference request to ``$DIGEST_LOG/<pid>``: request id, SHA-256 of the request
body as the engine read it, SHA-256 of the response body as the engine sent it, whether the response
was sent to its end.
"""

import hashlib
import os
from pathlib import Path
from typing import Any


class Digest:
    def __init__(self, app: Any) -> None:
        self._app = app
        self._log = (Path(os.environ["DIGEST_LOG"]) / str(os.getpid())).open("a", buffering=1)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked, answered, complete = hashlib.sha256(), hashlib.sha256(), False

        async def reading() -> Any:
            message = await receive()
            asked.update(message.get("body", b""))
            return message

        async def sending(message: Any) -> None:
            nonlocal complete
            if message["type"] == "http.response.body":
                answered.update(message.get("body", b""))
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, reading, sending)
        finally:
            name = headers.get(b"x-request-id", b"?").decode()
            self._log.write(f"{name} {asked.hexdigest()} {answered.hexdigest()} {int(complete)}\n")
