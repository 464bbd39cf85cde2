"""Prompts computed in one engine and answered by another: the decode worker's part of it.

A picker chooses both workers and sends the request to the one that answers, with the prefill
workers to ask in a signed header. Somebody has to make the two requests of vLLM's protocol out of
it, beside the engine whose cache is concerned, and to keep everybody else from making them: an
engine follows `kv_transfer_params` blindly. They read another prompt's cache, and incomplete ones
end the engine. So in workers with a role this module takes them out of whatever comes in:

    PYTHONPATH=<this folder> … --middleware dynamo_engine_prefill.RemotePrefill

One file, without imports from this project, like `dynamo_engine_middleware.py`, inside of which it
runs; aiohttp is there because vLLM itself needs it.

What happens to a request with a valid grant (`dynamo_runtime.prefill_grant` has its format):

1. Hop 1, to the first prefill worker: the same body, but one token, not streamed (a streamed answer
   has no parameters, and leaves the blocks held until their lease is over), and
   `{"do_remote_decode": true}`. A worker that can't be reached, fails, or gives incomplete
   parameters is passed over for the next one. What is wrong with the request itself (400, 413, 422)
   is the answer.
2. Hop 2, here: the body as it came, with the parameters that hop 1 gave, at once. Later than half
   of the prefill worker's lease (30 s) they are not used any more: the blocks may hold another
   prompt by then, and nobody would notice.

If every prefill worker fails, the prompt is computed here, or answered with 503 where the grant
says `enforce`. Either is counted and logged. A grant that is not valid counts as none.

In a prefill worker, `do_remote_decode` is let through with a grant, and nothing else is.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec

log = logging.getLogger("dynamo.prefill")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Mapping[bytes, bytes]
Json = dict[str, Any]

PREFILLERS_HEADER = b"x-prefiller-host-port"
GRANT_HEADER = b"x-dynamo-prefill-grant"
BOOKING_HEADER = b"x-dynamo-booking"
PREFILL_BOOKING = ".prefill"
FLIGHT = "dynamo.flight"  # where the middleware around this one keeps its note of the request

PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/inference/v1/generate"})
PASSED_ON = frozenset(
    {b"authorization", b"x-request-id", b"traceparent", b"tracestate", b"content-type"}
)

TRANSFER_KEYS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
EXTRA_ARGUMENTS = "vllm_xargs"  # vLLM merges it into what the keys above go to
NEEDED = (
    "remote_engine_id",
    "remote_request_id",
    "remote_block_ids",
    "remote_host",
    "remote_port",
)
ASK_PREFILL: Json = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

LEASE_S = 30.0  # vLLM's default of kv_lease_duration
CONNECT_S = 3.0
PREFILL_S = 600.0  # for a whole hop 1: as long as a proxy lets a stream be silent
REQUESTS_OWN = frozenset({400, 413, 422})  # statuses that another worker would give as well

# Outcomes, as they are reported.
REMOTE = "remote"  # a prefill worker computed the prompt
LOCAL = "local"  # none could, so it is computed here
REFUSED = "refused"  # none could, and the grant allows nothing else
REJECTED = "rejected"  # the prefill worker found the request itself wrong
INVALID = "invalid-grant"  # computed here, because what allows more is not to be believed


class Grant(NamedTuple):
    """What a picker allows; see `dynamo_runtime.prefill_grant`."""

    prefillers: tuple[str, ...]
    booking: str
    tokens: int  # of the prompt; -1 if not known
    enforce: bool
    local_tokens: int
    cached_tokens: tuple[int, ...]


class InvalidGrant(Exception):
    """The header is there and must not be followed; the message says why."""


class Failed(Exception):
    """A prefill worker did not do its part; the message says how."""


class Rejected(Exception):
    """The request itself is wrong: the answer that says so."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


def read_secret(env: Mapping[str, str]) -> bytes:
    """The graph's secret; b"" if there is none. The launcher has checked it."""
    text = env.get("DYN_PD_SECRET", "").encode()
    if not text and (path := env.get("DYN_PD_SECRET_FILE", "")):
        text = Path(path).read_bytes()
    return text.strip()


def read_grant(headers: Headers, secret: bytes, now: float) -> Grant | None:
    """The grant in ``headers``; None if there is none. ``now`` in Unix seconds.

    Raises ``InvalidGrant``.
    """
    if PREFILLERS_HEADER not in headers and GRANT_HEADER not in headers:
        return None
    if not secret:
        raise InvalidGrant("this worker has no secret (DYN_PD_SECRET_FILE)")
    addresses = headers.get(PREFILLERS_HEADER, b"").decode("latin-1")
    signed, found, mac = headers.get(GRANT_HEADER, b"").decode("latin-1").partition(";mac=")
    key, _, numbers = headers.get(BOOKING_HEADER, b"").decode("latin-1").partition(";")
    booking = key.strip().removesuffix(PREFILL_BOOKING)
    text = "\n".join(("dynamo-prefill-grant-1", addresses, booking, signed)).encode()
    right = hmac.new(secret, text, hashlib.sha256).hexdigest()
    if not found or not hmac.compare_digest(mac.encode(), right.encode()):
        raise InvalidGrant("its signature is wrong")
    # Signed by a picker, so well-formed.
    fields = dict(field.partition("=")[::2] for field in signed.split(";"))
    if now > int(fields["expires"]):
        raise InvalidGrant(f"it has expired {now - int(fields['expires']):.0f} s ago")
    tokens = dict(field.partition("=")[::2] for field in numbers.split(";")).get("tokens", "")
    return Grant(
        prefillers=tuple(addresses.split(",")),
        booking=booking,
        tokens=int(tokens) if tokens.isdecimal() else -1,
        enforce=fields["enforce"] == "1",
        local_tokens=int(fields["local"]),
        cached_tokens=tuple(int(one) for one in fields["cached"].split(",")),
    )


def decode(body: bytes) -> Json | None:
    """The body's JSON object, read as vLLM reads it; None if it is none."""
    value: Any
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def encode(fields: Json) -> bytes:
    try:
        return msgspec.json.encode(fields)
    except (ValueError, OverflowError):  # lone surrogates, numbers beyond 64 bits
        return json.dumps(fields).encode()


def without_transfer(fields: Json) -> Json:
    """``fields`` without what steers a transfer, in each place vLLM reads it from."""
    kept = {key: value for key, value in fields.items() if key not in TRANSFER_KEYS}
    extra = kept.get(EXTRA_ARGUMENTS)
    if isinstance(extra, dict):
        kept[EXTRA_ARGUMENTS] = {k: v for k, v in extra.items() if k not in TRANSFER_KEYS}
    return kept


def has_transfer(body: bytes) -> bool:
    """Whether the body may steer a transfer; a cheap look that never misses it."""
    if b"transfer_params" in body or b"kv_cache_report_mode" in body:
        return True
    return b"\\u" in body or b"\0" in body  # a key may be written in escapes, or in UTF-16


def hop1_body(fields: Json) -> Json:
    """The request for the prompt alone."""
    body = without_transfer(fields)
    for key in ("stream_options", "min_tokens", "best_of"):
        body.pop(key, None)
    if isinstance(parameters := body.get("sampling_params"), dict):  # /inference/v1/generate
        body["sampling_params"] = {**parameters, "max_tokens": 1, "min_tokens": 0}
    else:
        body["max_tokens"] = 1
    if body.get("max_completion_tokens") is not None:
        body["max_completion_tokens"] = 1
    return {**body, "stream": False, "kv_transfer_params": ASK_PREFILL}


def complete(params: object) -> bool:
    """Whether hop 1 gave what hop 2 needs: an engine dies of less."""
    return (
        isinstance(params, dict)
        and params.get("do_remote_prefill") is True
        and all(params.get(key) is not None for key in NEEDED)
    )


async def read_body(receive: Receive) -> bytes | None:
    """The whole body; None if the client left before its end."""
    parts = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


class RemotePrefill:
    """Pure ASGI middleware of a prefill or decode worker.

    ``wall`` gives Unix seconds, ``clock`` monotonic ones.
    """

    def __init__(
        self,
        app: App,
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self._wall = wall
        self._clock = clock
        self._decodes = os.environ.get("DYN_COMPONENT_TYPE") == "decode"
        self._secret = read_secret(os.environ)
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, send)
            finally:
                await self.close()
            return
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = await read_body(receive)
        if body is None:
            return
        headers: Headers = dict(scope["headers"])
        if self._decodes and scope["path"] in PATHS:
            await self._decode(scope, headers, body, receive, send)
        else:
            allowed = not self._decodes and self._allowed(headers)
            await self._pass(scope, self._cleaned(body, allowed), receive, send)

    # --- a prefill worker, and whatever is no generation

    def _allowed(self, headers: Headers) -> bool:
        try:
            return read_grant(headers, self._secret, self._wall()) is not None
        except InvalidGrant as error:
            log.warning("a request for prefill is taken as an ordinary one: %s", error)
            return False

    def _cleaned(self, body: bytes, allowed: bool) -> bytes:
        """``body`` without transfer parameters; with ``allowed``, those of hop 1 stay."""
        if not has_transfer(body):
            return body
        fields = decode(body)
        if fields is None:
            return body  # the engine says what is wrong with it
        clean = without_transfer(fields)
        if allowed and fields.get("kv_transfer_params") == ASK_PREFILL:
            clean["kv_transfer_params"] = ASK_PREFILL
        return body if clean == fields else encode(clean)

    async def _pass(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Go on with ``body`` in place of what came; ``receive`` has nothing more but the end."""
        begun = False

        async def replay() -> Message:
            nonlocal begun
            if begun:
                return await receive()
            begun = True
            return {"type": "http.request", "body": body, "more_body": False}

        length = str(len(body)).encode()
        kept = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers = [*kept, (b"content-length", length)]
        await self.app({**scope, "headers": headers}, replay, send)

    # --- a decode worker

    async def _decode(
        self, scope: Scope, headers: Headers, body: bytes, receive: Receive, send: Send
    ) -> None:
        flight = scope.get(FLIGHT)
        try:
            grant = read_grant(headers, self._secret, self._wall())
        except InvalidGrant as error:
            log.warning("prefill workers are not asked: the grant is not valid: %s", error)
            if b"enforce=1" in headers.get(GRANT_HEADER, b""):
                self._tell(flight, REFUSED)
                await _refuse(send, "the permission to ask a prefill worker is not valid")
                return
            self._tell(flight, INVALID)
            grant = None
        fields = decode(body) if grant is not None else None
        if grant is None or fields is None:
            if flight is not None and GRANT_HEADER in headers:
                flight.computes(0)
            await self._pass(scope, self._cleaned(body, False), receive, send)
            return

        # The client may leave meanwhile, which ends hop 1, and with it the prefill.
        gone = asyncio.ensure_future(receive())
        hop1 = asyncio.ensure_future(self._hop1(scope, headers, grant, fields))
        try:
            await asyncio.wait({gone, hop1}, return_when=asyncio.FIRST_COMPLETED)
            if not hop1.done():
                return
            try:
                params, failed, given_at = hop1.result()
            except Rejected as rejected:
                self._tell(flight, REJECTED)
                await _answer(send, rejected.status, rejected.body)
                return
            if params is not None and self._clock() - given_at > LEASE_S / 2:
                log.warning("%s: the lease of its blocks is as good as over", grant.booking)
                params = None
            clean = without_transfer(fields)
            if params is not None:
                self._tell(flight, REMOTE, failed)
                clean["kv_transfer_params"] = params
            elif grant.enforce:
                self._tell(flight, REFUSED, failed)
                await _refuse(send, "no prefill worker computed the prompt")
                return
            else:
                log.warning("%s: no prefill worker did, so its prompt is computed here",
                            grant.booking)  # fmt: skip
                self._tell(flight, LOCAL, failed)
                if flight is not None:
                    flight.computes(grant.local_tokens)

            async def gone_or_end() -> Message:
                return await asyncio.shield(gone)

            await self._pass(scope, encode(clean), gone_or_end, send)
        finally:
            for task in (gone, hop1):
                task.cancel()
            await asyncio.gather(gone, hop1, return_exceptions=True)

    def _tell(self, flight: Any, outcome: str, failed: Sequence[str] = ()) -> None:
        """``failed``: prefill workers (``ip:port``) that were asked in vain."""
        if flight is not None:
            flight.prefilled(outcome, failed)

    async def _hop1(
        self, scope: Scope, headers: Headers, grant: Grant, fields: Json
    ) -> tuple[Json | None, list[str], float]:
        """Ask one after the other: (parameters or None, those asked in vain, monotonic time of the
        answer)."""
        body = encode(hop1_body(fields))
        failed: list[str] = []
        for address, cached in zip(grant.prefillers, grant.cached_tokens, strict=True):
            booking = f"{grant.booking}{PREFILL_BOOKING}"
            if grant.tokens >= 0:
                booking += f";tokens={grant.tokens};cached={cached}"
            sent = {
                name.decode("latin-1"): value.decode("latin-1")
                for name, value in headers.items()
                if name in PASSED_ON or name in (PREFILLERS_HEADER, GRANT_HEADER)
            }
            sent[BOOKING_HEADER.decode()] = booking
            try:
                params = await self._ask(f"http://{address}{scope['path']}", sent, body)
                return params, failed, self._clock()
            except Failed as error:
                failed.append(address)
                log.warning("%s: prefill worker %s: %s", grant.booking, address, error)
        return None, failed, self._clock()

    async def _ask(self, url: str, headers: Mapping[str, str], body: bytes) -> Json:
        """One hop 1. Raises ``Failed`` or ``Rejected``."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=PREFILL_S, sock_connect=CONNECT_S),
                # A kept connection may be to a process that is gone, which looks like a failure.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                skip_auto_headers=("User-Agent",),
            )
        try:
            async with self._session.post(
                url, data=body, headers=headers, allow_redirects=False
            ) as response:
                answer = await response.read()
        except TimeoutError:
            raise Failed("no answer in time") from None
        except aiohttp.ClientError as error:
            raise Failed(str(error) or type(error).__name__) from None
        if response.status in REQUESTS_OWN:
            raise Rejected(response.status, answer)
        if response.status != 200:
            raise Failed(f"status {response.status}")
        params = (decode(answer) or {}).get("kv_transfer_params")
        if not complete(params):
            raise Failed("its answer has no complete kv_transfer_params")
        assert isinstance(params, dict)
        return params

    async def close(self) -> None:
        """The server ends."""
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _refuse(send: Send, why: str) -> None:
    error = {
        "message": f"No prefill: {why}, and this deployment allows no other way.",
        "type": "service_unavailable",
        "param": None,
        "code": "no_prefill_worker_available",
    }
    await _answer(send, 503, encode({"error": error}))


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
