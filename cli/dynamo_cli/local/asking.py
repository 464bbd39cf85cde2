"""Asks a probe's question: over HTTP, TCP or gRPC, or by running a command.

What counts as success is Kubernetes': status 200 to 399, a connection that opens, SERVING, exit
status 0. Every failure comes back as text for the live view, never as an exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import msgspec

from dynamo_cli.local.probes import Action, Exec, Grpc, HttpGet, TcpSocket

MAX_BODY = 4096  # bytes read of an answer
MAX_SHOWN = 200  # characters of it shown as the reason of a failure

RunCommand = Callable[[tuple[str, ...]], Awaitable[tuple[int, str]]]


@dataclass(frozen=True, slots=True)
class Answer:
    ok: bool
    message: str


async def ask(action: Action, address: str, timeout_s: float, run: RunCommand) -> Answer:
    """Ask once. ``address`` is the pod's; ``run`` runs a command inside the container."""
    try:
        async with asyncio.timeout(timeout_s):
            match action:
                case HttpGet():
                    return await _http(action, address)
                case TcpSocket():
                    return await _tcp(action, address)
                case Grpc():
                    return await _grpc(action, address)
                case Exec():
                    status, output = await run(action.command)
                    last = output.strip().rpartition("\n")[2]
                    return Answer(status == 0, f"exit status {status}: {last}".rstrip(": "))
    except TimeoutError:
        return Answer(False, f"no answer within {timeout_s:g} s")


async def _http(action: HttpGet, address: str) -> Answer:
    url = f"{action.scheme.lower()}://{action.host or address}:{action.port}{action.path}"
    headers = {"User-Agent": "kube-probe/1.36", "Accept": "*/*", "Connection": "close"}
    headers |= dict(action.headers)
    try:
        # One session a question: a kubelet reuses no connection either, so that a server which
        # accepts no new ones is found out.
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.get(url, headers=headers, ssl=False, max_redirects=10) as response,
        ):
            body = await response.content.read(MAX_BODY)
            ok = 200 <= response.status < 400
            return Answer(ok, f"{action.path} says {response.status} {_gist(body)}".strip())
    except aiohttp.ClientConnectorError as error:
        return Answer(False, f"port {action.port}: {_reason(error.os_error)}")
    except aiohttp.TooManyRedirects:
        return Answer(False, f"{action.path}: more than 10 redirects")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return Answer(False, f"port {action.port}: {error or type(error).__name__}")


def _gist(body: bytes) -> str:
    """What a body says in a few words: the ``reason`` of a JSON object, else its first line."""
    try:
        return msgspec.json.decode(body, type=_Status).reason
    except msgspec.DecodeError:
        lines = body.decode(errors="replace").strip().splitlines()
        return lines[0][:MAX_SHOWN] if lines else ""


class _Status(msgspec.Struct):
    reason: str


def _reason(error: OSError) -> str:
    """The system's own words: the event loops each wrap them in others."""
    return os.strerror(error.errno) if error.errno else str(error)


async def _tcp(action: TcpSocket, address: str) -> Answer:
    try:
        _, writer = await asyncio.open_connection(action.host or address, action.port)
    except OSError as error:
        return Answer(False, f"port {action.port}: {_reason(error)}")
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return Answer(True, f"port {action.port} is open")


async def _grpc(action: Grpc, address: str) -> Answer:
    # gRPC takes part in every fork by default: it closes and opens its epoll descriptors around it,
    # in the parent too, and other threads then wait on numbers that somebody else has got by now.
    # A fork is only ever followed by exec here. Source: gRPC's doc/fork_support.md.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

    # Imported here: only graphs with a gRPC probe need it.
    import grpc
    import grpc.aio

    # grpc.health.v1: HealthCheckRequest{service = 1}, HealthCheckResponse{status = 1; SERVING = 1}
    name = action.service.encode()
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    channel = grpc.aio.insecure_channel(f"{address}:{action.port}")
    try:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        response = await check(request)
    except grpc.aio.AioRpcError as error:
        return Answer(False, f"port {action.port}: {error.code().name} {error.details()}")
    finally:
        await channel.close(None)
    serving = response == b"\x08\x01"
    return Answer(serving, f"health service says {'SERVING' if serving else 'NOT_SERVING'}")
