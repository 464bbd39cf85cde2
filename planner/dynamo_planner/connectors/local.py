"""The local runner's side of the seam: `dynamo up` serves scales on a socket of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec
from dynamo_runtime.kubernetes.client import ApiError, ApiUnreachable

TIMEOUT_S = 5.0


class LocalScaleApi:
    """Kubernetes' scale subresource over a Unix socket; close it."""

    def __init__(self, socket: str) -> None:
        """Needs a running event loop."""
        self._socket = socket
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(socket),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        )

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str) -> dict[str, Any]:
        return await self._request("GET", path)

    async def merge_patch(
        self, path: str, body: Mapping[str, Any], *, field_manager: str | None = None
    ) -> dict[str, Any]:
        return await self._request("PATCH", path, msgspec.json.encode(body))

    async def _request(self, method: str, path: str, data: bytes | None = None) -> dict[str, Any]:
        try:
            async with self._session.request(method, f"http://local{path}", data=data) as answer:
                content = await answer.read()
        except TimeoutError as error:
            raise ApiUnreachable(f"{self._socket} did not answer in time", "Timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ApiUnreachable(f"{self._socket}: {error}") from error
        try:
            decoded = msgspec.json.decode(content, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ApiError(answer.status, "InvalidAnswer", f"{path}: {error}") from error
        if answer.status >= 400:
            message = str(decoded.get("message") or path)
            raise ApiError(answer.status, str(decoded.get("reason") or "Unknown"), message, decoded)
        return decoded
