"""What an engine says of its KV cache, in the engine's own words.

vLLM publishes batches of events on a ZeroMQ PUB socket (frames: topic, sequence number as 8 bytes
big endian, msgpack payload ``[timestamp, [event, …], data-parallel rank]``) and keeps the last of
them for replay on a ROUTER socket. Two encodings of an event exist: a map tagged by ``type``, and
an older positional array that starts with the tag. Both are read; unknown fields and events are
passed over and counted.

PUB drops what a slow or late subscriber misses. ``EngineEventSource`` notices that by the numbers,
asks for a replay, and says so where even that leaves a hole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

log = logging.getLogger(__name__)

Hash = int | bytes
"""An engine's name for a block: opaque here."""

END_OF_REPLAY = b"\xff" * 8
REPLAY_TIMEOUT_S = 5.0
QUIET_S = 1.0


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
class Missed:
    """Batches ``first`` to ``last`` are lost for good: what is known of the cache may be wrong."""

    first: int
    last: int


Item = EngineBatch | Restarted | Caught | Missed

# Positional order of the older encoding.
_STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
    "lora_name", "extra_keys", "group_idx",
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
    try:
        if tag == "BlockStored":
            return BlockStored(
                block_hashes=fields["block_hashes"],
                parent=fields.get("parent_block_hash"),
                token_ids=fields.get("token_ids") or (),
                block_size=fields["block_size"],
                lora=fields.get("lora_name") or None,
                extra_keys=fields.get("extra_keys"),
                medium=fields.get("medium") or "GPU",
                group=fields.get("group_idx") or 0,
            )
        if tag == "BlockRemoved":
            return BlockRemoved(
                fields["block_hashes"],
                fields.get("medium") or "GPU",
                fields.get("group_idx") or 0,
            )
    except KeyError as error:
        raise Undecodable(f"{tag} without {error.args[0]}") from error
    return AllBlocksCleared() if tag == "AllBlocksCleared" else None


class EngineEventSource:
    """One engine's event socket as an ordered stream.

    ``endpoint`` and ``replay_endpoint`` are ZeroMQ addresses to connect to; nothing needs to listen
    there yet. Iterating gives batches in order without gaps or repeats, ``Restarted`` before the
    first batch of an engine that began anew, and ``Missed`` where batches are lost. ``Caught``
    comes once an engine's replay has told all of its past that it still has; without a replay
    socket the past is known only from the number of the first batch.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        topic: str = "",
        replay_timeout_s: float = REPLAY_TIMEOUT_S,
    ) -> None:
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._topic = topic.encode()
        self._timeout_s = replay_timeout_s
        self._next = 0  # number of the batch that should come
        self.undecodable = 0
        self.gaps = 0

    async def batches(self) -> AsyncIterator[Item]:
        """Everything the engine says, from its start as far as its replay reaches."""
        context = zmq.asyncio.Context.instance()
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 0)  # memory is cheaper than a gap
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.SUBSCRIBE, self._topic)
        try:
            socket.connect(self._endpoint)
            if self._replay_endpoint is not None:
                # What was said before we subscribed, if the engine runs already.
                replayed = await self._replay(0)
                for batch in replayed or ():
                    if batch.seq > self._next:
                        yield Missed(self._next, batch.seq - 1)
                    yield batch
                    self._next = batch.seq + 1
                if replayed is not None:
                    yield Caught()
            while True:
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
            for batch in await self._replay(self._next) or ():
                if self._next <= batch.seq < seq:
                    if batch.seq > self._next:
                        yield Missed(self._next, batch.seq - 1)
                    yield batch
                    self._next = batch.seq + 1
            if seq > self._next:
                yield Missed(self._next, seq - 1)
        try:
            yield decode_batch(payload, seq)
        except Undecodable as error:
            self.undecodable += 1
            log.warning("%s: batch %d: %s", self._endpoint, seq, error)
            yield Missed(seq, seq)
        self._next = seq + 1

    async def _began_anew(self, seq: int) -> bool:
        if self._replay_endpoint is None:
            return True
        newest = max((batch.seq for batch in await self._replay(seq) or ()), default=-1)
        return newest + 1 < self._next

    async def _replay(self, start: int) -> list[EngineBatch] | None:
        """Batches from ``start`` on that the engine still has; ``None`` if it does not answer."""
        if self._replay_endpoint is None:
            return None
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        batches: list[EngineBatch] = []
        try:
            socket.connect(self._replay_endpoint)
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            async with asyncio.timeout(self._timeout_s):
                while True:
                    # [b"", topic, number, payload], without the topic from older engines
                    frames = await socket.recv_multipart()
                    number = frames[-2]
                    if number == END_OF_REPLAY:
                        break
                    batches.append(decode_batch(frames[-1], int.from_bytes(number, "big")))
        except TimeoutError:
            log.warning("%s: no replay within %g s", self._replay_endpoint, self._timeout_s)
            return None
        except (Undecodable, IndexError) as error:
            self.undecodable += 1
            log.warning("%s: replay: %s", self._replay_endpoint, error)
        finally:
            socket.close()
        return batches
