"""An engine behind OpenAI's completions API, asked with token ids."""

from __future__ import annotations

import time
from collections.abc import Sequence

import aiohttp
import msgspec

from dynamo_planner.profiling.measure import Answer

TIMEOUT_S = 600.0


class ProfilingFailed(Exception):
    """The engine can't be reached, or refused; the message says which and why."""


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[object] = msgspec.field(default_factory=list)
    usage: _Usage | None = None


class HttpEngine:
    """One engine; make it with ``at`` and close its session."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: _Model) -> None:
        self._session = session
        self._url = url
        self.model = model.id
        self.longest = model.max_model_len
        """Prompt and answer together, tokens; None if it does not tell."""

    @classmethod
    async def at(cls, session: aiohttp.ClientSession, url: str, model: str = "") -> HttpEngine:
        """The engine at ``url`` with ``model``, or its first one. Raises ``ProfilingFailed``."""
        url = url.rstrip("/")
        try:
            async with session.get(f"{url}/v1/models") as answer:
                found = msgspec.json.decode(await answer.read(), type=_Models).data
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ProfilingFailed(f"{url}: {error or type(error).__name__}") from error
        except msgspec.DecodeError as error:
            raise ProfilingFailed(
                f"{url}/v1/models: {answer.status}, no models: {error}"
            ) from error
        chosen = [each for each in found if each.id == model or not model]
        if not chosen:
            names = ", ".join(each.id for each in found) or "none"
            raise ProfilingFailed(f"{url} serves {names}, not {model!r}")
        return cls(session, url, chosen[0])

    async def answer(self, prompt: Sequence[int], tokens: int) -> Answer:
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        arrived: list[float] = []
        made = 0
        sent = time.perf_counter()
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    text = (await response.text())[:300]
                    raise ProfilingFailed(f"{self._url}: {response.status} {text}")
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    chunk = msgspec.json.decode(line[len(b"data: ") :], type=_Chunk)
                    if chunk.choices:
                        arrived.append(now)
                    if chunk.usage is not None:
                        made = chunk.usage.completion_tokens
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
            raise ProfilingFailed(f"{self._url}: {error or type(error).__name__}") from error
        if not arrived:
            raise ProfilingFailed(f"{self._url}: an answer without a single token")
        return Answer(sent, arrived, made or len(arrived))
