"""What is sent and what must come back, to the byte; and the clients that send it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass, field

SENTENCE = "You are a helpful assistant. "
SMALL = 600
"""Bytes of a body."""
PREFIXES = 8
"""Different beginnings of larger bodies."""
CHUNKS = 100
CHUNK_EVERY_S = 0.005
MODEL = "bench"


def request_body(number: int, stream: bool, size: int = SMALL) -> bytes:
    """A chat of some ``size`` bytes whose beginning many requests share."""
    said = SENTENCE * ((size - 116) // len(SENTENCE))
    if size > SMALL:
        said = f"{number % PREFIXES} {said}"
    messages = [
        {"role": "system", "content": said},
        {"role": "user", "content": f"request {number}"},
    ]
    return json.dumps({"model": MODEL, "messages": messages, "stream": stream}).encode()


def answer_parts(body: bytes, stream: bool) -> list[bytes]:
    """The answer to ``body``: one JSON object, or ``CHUNKS`` events and the end mark. Each part
    holds a digest of the request, so that an answer to another one is noticed."""
    digest = hashlib.sha256(body).hexdigest()
    if not stream:
        choice = {"message": {"role": "assistant", "content": digest}}
        return [json.dumps({"object": "chat.completion", "choices": [choice]}).encode()]
    events = [
        b"data: "
        + json.dumps({"object": "chat.completion.chunk", "n": n, "delta": digest}).encode()
        + b"\n\n"
        for n in range(CHUNKS)
    ]
    return [*events, b"data: [DONE]\n\n"]


@dataclass
class Outcome:
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds to the last byte, each answer


async def load(
    host: str,
    port: int,
    *,
    stream: bool,
    connections: int,
    seconds: float,
    first: int = 0,
    size: int = SMALL,
) -> Outcome:
    """Closed loop over kept-alive HTTP/1.1 connections; every answer is compared."""
    outcome = Outcome()
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    numbers = iter(range(first, 1 << 62))

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            while loop.time() < end:
                body = request_body(next(numbers), stream, size)
                began = loop.time()
                writer.write(
                    b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\n"
                    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
                    % len(body)
                    + body
                )
                status, got = await _response(reader)
                outcome.times.append(loop.time() - began)
                outcome.answered += 1
                if status != 200:
                    outcome.wrong.append(f"status {status}: {got[:200]!r}")
                elif got != b"".join(answer_parts(body, stream)):
                    outcome.wrong.append(f"{len(got)} other bytes")
        finally:
            writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return outcome


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    lower = head.lower()
    at = lower.find(b"content-length:")
    if at >= 0:
        length = int(lower[at + 15 : lower.index(b"\r", at)])
        return status, await reader.readexactly(length)
    parts = []
    while True:
        size = int(await reader.readuntil(b"\r\n"), 16)
        data = await reader.readexactly(size + 2)
        if size == 0:
            return status, b"".join(parts)
        parts.append(data[:-2])
