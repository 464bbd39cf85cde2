"""What an engine says of its KV cache, in the engine's own words.

vLLM publishes batches of events on a ZeroMQ PUB socket (frames: topic, sequence number as 8 bytes
big endian, msgpack payload ``[timestamp, [event, …], data-parallel rank]``) and keeps the last of
them for replay on a ROUTER socket. Two encodings of an event exist: a map tagged by ``type``, and
an older positional array that starts with the tag. Both are read; unknown fields and events are
passed over and counted.

PUB drops what a slow or late subscriber misses. ``EngineEventSource`` notices that by the numbers,
asks for a replay, and says so where even that leaves a hole. A last message that is lost has no
successor to tell by its number: an engine that turns quiet is asked whether that was all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

log = logging.getLogger(__name__)

Hash = int | bytes
"""An engine's name for a block: opaque here."""

END_OF_REPLAY = b"\xff" * 8
REPLAY_TIMEOUT_S = 5.0
QUIET_S = 1.0
"""An engine from which nothing came for so long is asked for what was perhaps lost…"""
IDLE_S = 5.0
"""…and again each time that so much more has gone by in silence."""


class Undecodable(ValueError):
    """A payload that is no batch of KV events; the message says what it is instead."""


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Blocks entered the cache; ``len(token_ids) == len(block_hashes) * block_size``."""

    block_hashes: Sequence[Hash]
    parent: Hash | None  # the block before the first; None: the prompt begins here
    token_ids: Sequence[int]
    block_size: int
    lora: str | None = None
    extra_keys: Sequence[Sequence[object] | None] | None = None  # one entry a block
    medium: str = "GPU"
    group: int = 0
    kind: str | None = None  # of the cache group; None: the engine has but one
    lora_id: int | None = None  # older engines have it without a name


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks left the cache."""

    block_hashes: Sequence[Hash]
    medium: str = "GPU"
    group: int = 0


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Every block left the cache."""


EngineEvent = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True)
class EngineBatch:
    """One message of an engine. ``skipped``: events of kinds that are not known."""

    seq: int
    events: tuple[EngineEvent, ...]
    rank: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Restarted:
    """The engine began anew: nothing is cached."""


@dataclass(frozen=True, slots=True)
class Caught:
    """All that can be had of the past has been given; what follows happens now."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Batches are missing and being asked for. What comes of it follows at once: the batches, or
    ``Missed`` or ``Restarted``, and then the batch that showed the gap, if one did."""


@dataclass(frozen=True, slots=True)
class Missed:
    """Batches ``first`` to ``last`` are lost for good: what is known of the cache may be wrong."""

    first: int
    last: int


Item = EngineBatch | Restarted | Caught | Gap | Missed

# Positional order of the older encoding.
_STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
    "lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind",
)  # fmt: skip
_REMOVED = ("block_hashes", "medium", "group_idx")

_decode = msgspec.msgpack.Decoder().decode


def decode_batch(payload: bytes, seq: int = 0) -> EngineBatch:
    """Read one payload. Raises ``Undecodable``."""
    try:
        batch = _decode(payload)
    except msgspec.DecodeError as error:
        raise Undecodable(f"no msgpack: {error}") from error
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise Undecodable("no [timestamp, events, rank]")
    rank = batch[2] if len(batch) > 2 and isinstance(batch[2], int) else 0
    events = [_event(raw) for raw in batch[1]]
    known = tuple(event for event in events if event is not None)
    return EngineBatch(seq, known, rank, len(events) - len(known))


def _event(raw: Any) -> EngineEvent | None:
    if isinstance(raw, dict):
        tag, fields = raw.get("type"), raw
    elif isinstance(raw, list) and raw:
        tag = raw[0]
        names = _STORED if tag == "BlockStored" else _REMOVED
        fields = dict(zip(names, raw[1:], strict=False))
    else:
        return None
    if tag == "BlockStored":
        extra_keys = fields.get("extra_keys")
        return BlockStored(
            block_hashes=_hashes(tag, fields),
            # llm-d's simulator has 0 where vLLM has nil.
            parent=_field(tag, fields, "parent_block_hash", int, bytes) or None,
            token_ids=_field(tag, fields, "token_ids", list) or (),
            block_size=_field(tag, fields, "block_size", int) or 0,
            lora=_field(tag, fields, "lora_name", str) or None,
            extra_keys=_extra_keys(extra_keys),
            medium=_field(tag, fields, "medium", str) or "GPU",
            group=_field(tag, fields, "group_idx", int) or 0,
            kind=_field(tag, fields, "kv_cache_spec_kind", str),
            lora_id=_field(tag, fields, "lora_id", int),
        )
    if tag == "BlockRemoved":
        return BlockRemoved(
            _hashes(tag, fields),
            _field(tag, fields, "medium", str) or "GPU",
            _field(tag, fields, "group_idx", int) or 0,
        )
    return AllBlocksCleared() if tag == "AllBlocksCleared" else None


def _field(tag: str, fields: dict[str, Any], name: str, *kinds: type) -> Any:
    """A field that may be missing or nil; raises ``Undecodable`` if it is of another type."""
    value = fields.get(name)
    if value is not None and not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise Undecodable(f"{tag}.{name}: {type(value).__name__}, expected {expected}")
    return value


def _hashes(tag: str, fields: dict[str, Any]) -> Sequence[Hash]:
    hashes = fields.get("block_hashes")
    if not isinstance(hashes, list) or not all(isinstance(one, int | bytes) for one in hashes):
        raise Undecodable(f"{tag}.block_hashes: expected a list of int or bytes")
    return hashes


def _extra_keys(value: Any) -> Sequence[Sequence[object] | None] | None:
    if value is None:
        return None
    if isinstance(value, list) and all(one is None or isinstance(one, list) for one in value):
        return value
    raise Undecodable("BlockStored.extra_keys: expected a list with a list or nil for each block")


class Messages(Protocol):
    """Where the messages of one engine arrive; a ZeroMQ socket is one."""

    def poll(self, timeout: float | None = None) -> Awaitable[Any]:
        """Wait so many milliseconds for a message; false if none came."""
        ...

    def recv_multipart(self) -> Awaitable[Any]:
        """The frames of the next message."""
        ...

    def close(self) -> None: ...


class EngineEventSource:
    """One engine's event socket as an ordered stream.

    ``endpoint`` and ``replay_endpoint`` are ZeroMQ addresses to connect to; nothing needs to listen
    there yet. Iterating gives batches in order without gaps or repeats, ``Restarted`` before the
    first batch of an engine that began anew, and ``Missed`` where batches are lost; ``Gap`` comes
    before the replay is asked for some. ``Caught`` comes once an engine's replay has told all of
    its past that it still has; without a replay socket the past is known only from the number of
    the first batch. Where there is one, an engine that is quiet for ``quiet_s`` is asked for what
    came after its last batch, and then each ``idle_s``: also one that began anew and has said
    nothing yet is known by that. ``messages`` is where the engine's messages arrive if it sends
    them by itself; then nothing is connected to ``endpoint``, which names the engine in the log.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        topic: str = "",
        replay_timeout_s: float = REPLAY_TIMEOUT_S,
        quiet_s: float = QUIET_S,
        idle_s: float = IDLE_S,
        messages: Messages | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._topic = topic.encode()
        self._timeout_s = replay_timeout_s
        self._quiet_s = quiet_s
        self._idle_s = idle_s
        self._messages = messages
        self._next = 0  # number of the batch that should come
        self._last = b""  # payload of the one before
        self._replay_answers = True  # until it did not
        self.undecodable = 0
        self.gaps = 0

    @property
    def replays(self) -> bool:
        """Whether there is a socket to ask for the past."""
        return self._replay_endpoint is not None

    def _connect(self) -> Messages:
        socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 0)  # memory is cheaper than a gap
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.SUBSCRIBE, self._topic)
        try:
            socket.connect(self._endpoint)
        except zmq.ZMQError:
            socket.close()
            raise
        return socket

    async def batches(self) -> AsyncIterator[Item]:
        """Everything the engine says, from its start as far as its replay reaches."""
        socket = self._messages or self._connect()
        try:
            if self._replay_endpoint is not None:
                # What was said before we subscribed, if the engine runs already.
                replayed = await self._replay(0)
                for number, payload in replayed or ():
                    for item in self._take(number, payload):
                        yield item
                if replayed is not None:
                    yield Caught()
            wait_s = self._quiet_s
            while True:
                # Not a timeout around the reception: cancelled, that can lose a message.
                if self.replays and not await socket.poll(wait_s * 1e3):
                    wait_s = self._idle_s
                    async for item in self._unheard(await self._asked_while_quiet(socket)):
                        yield item
                    continue
                wait_s = self._quiet_s
                frames = await socket.recv_multipart()
                if len(frames) != 3:
                    self.undecodable += 1
                    continue
                seq = int.from_bytes(frames[1], "big")
                async for item in self._live(seq, frames[2]):
                    yield item
        finally:
            socket.close()

    async def _live(self, seq: int, payload: bytes) -> AsyncIterator[Item]:
        if seq < self._next:
            # Replayed batches arrive live as well, if they were on their way already; an engine
            # that began anew counts from 0. Only its replay, or a 0, tells the two apart.
            if seq > 0 and not await self._began_anew(seq):
                return
            yield Restarted()
            self._next = 0
        if seq > self._next:
            self.gaps += 1
            if self._replay_endpoint is not None:
                yield Gap()
            async for item in self._fill(await self._replay(self._start), seq):
                yield item
        for item in self._take(seq, payload):
            yield item

    async def _asked_while_quiet(self, socket: Messages) -> list[tuple[int, bytes]] | None:
        """The replay from ``_start`` on; ``None`` if the engine does not answer, or says something
        before it does: that must not wait."""
        asking = asyncio.ensure_future(self._replay(self._start))
        hearing = asyncio.ensure_future(socket.poll())
        try:
            await asyncio.wait({asking, hearing}, return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
        finally:
            asking.cancel()
            hearing.cancel()
            await asyncio.gather(asking, hearing, return_exceptions=True)

    async def _unheard(self, replayed: list[tuple[int, bytes]] | None) -> AsyncIterator[Item]:
        """What a quiet engine has said that did not arrive here."""
        if replayed is None:
            return
        if self._next and not replayed:
            yield Restarted()  # it does not have what it said last, nor anything since
            self._next = 0
            replayed = await self._replay(0)
        if replayed and replayed != [(self._next - 1, self._last)]:
            self.gaps += 1
            yield Gap()
            async for item in self._fill(replayed, replayed[-1][0] + 1):
                yield item

    @property
    def _start(self) -> int:
        """The last batch that came: if an engine has another one of its number, it is another
        engine, which has counted past us."""
        return max(self._next - 1, 0)

    async def _fill(
        self, replayed: list[tuple[int, bytes]] | None, until: int
    ) -> AsyncIterator[Item]:
        """The batches before ``until`` out of the replay from ``_start`` on."""
        start = self._start
        if self._next and replayed and replayed[0][0] == start and replayed[0][1] != self._last:
            yield Restarted()
            self._next = 0
            replayed = await self._replay(0)
        for number, payload in replayed or ():
            if self._next <= number < until:
                for item in self._take(number, payload):
                    yield item

    def _take(self, number: int, payload: bytes) -> Iterator[Item]:
        """The next batch, after ``Missed`` if others should have come before."""
        if number > self._next:
            yield Missed(self._next, number - 1)
        self._next = number + 1
        self._last = payload
        try:
            yield decode_batch(payload, number)
        except Undecodable as error:
            self.undecodable += 1
            log.warning("%s: batch %d: %s", self._endpoint, number, error)
            yield Missed(number, number)

    async def _began_anew(self, seq: int) -> bool:
        if self._replay_endpoint is None:
            return True
        newest = max((number for number, _ in await self._replay(seq) or ()), default=-1)
        return newest + 1 < self._next

    async def _replay(self, start: int) -> list[tuple[int, bytes]] | None:
        """Numbers and payloads from ``start`` on; ``None`` if the engine does not answer."""
        if self._replay_endpoint is None:
            return None
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        batches: list[tuple[int, bytes]] = []
        try:
            socket.connect(self._replay_endpoint)
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            async with asyncio.timeout(self._timeout_s):
                while True:
                    # [b"", topic, number, payload], without the topic from older engines
                    frames = await socket.recv_multipart()
                    if len(frames) < 3 or frames[-2] == END_OF_REPLAY:
                        break
                    batches.append((int.from_bytes(frames[-2], "big"), frames[-1]))
        except TimeoutError:
            if self._replay_answers:
                log.warning("%s: no replay within %g s", self._replay_endpoint, self._timeout_s)
            self._replay_answers = False
            return None
        finally:
            socket.close()
        self._replay_answers = True
        return batches
