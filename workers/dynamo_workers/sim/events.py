"""The raw KV events on ZMQ, byte for byte in vLLM's form.

A message has three frames: topic, sequence number (8 bytes big-endian, from 0), payload. The
payload is a msgpack array `[timestamp, [event, …], data-parallel rank]`, each event a map with its
name under `type`; fields at their default are left out. Missed batches are replayed on a ROUTER
socket: a request is `["", first number]`, the answer is one message `["", topic, number, payload]`
a batch and then `["", "", ff × 8, ""]`.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from dynamo_workers.sim.adapters import Adapter
from dynamo_workers.sim.blocks import Cleared, Event, Removed, Stored

log = logging.getLogger(__name__)

END_OF_REPLAY = b"\xff" * 8


class KVEventsConfig(msgspec.Struct, forbid_unknown_fields=True):
    """`--kv-events-config`, with vLLM's names and defaults.

    Endpoints that contain `*` or `::`, and ipc and inproc ones, are bound; the PUB socket connects
    to any other. `max_queue_size` is accepted and has no meaning here: there is no queue.
    """

    enable_kv_cache_events: bool = False
    publisher: str | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    @classmethod
    def parse(cls, text: str) -> "KVEventsConfig":
        """Reads the flag's JSON; ValueError says what is wrong with it."""
        try:
            config = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"--kv-events-config: {error}") from error
        if config.publisher not in (None, "zmq", "null"):
            raise ValueError(
                f"--kv-events-config: publisher {config.publisher!r} is unknown; use zmq or null"
            )
        return config

    @property
    def publishes(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"


class BlockStored(msgspec.Struct, omit_defaults=True, tag=True):
    """vLLM's event for blocks that became cached; the required fields always stand in it."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, omit_defaults=True, tag=True):
    """vLLM's event for evicted blocks, one hash each."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, omit_defaults=True, tag=True):
    """vLLM's event for a reset prefix cache."""


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """One payload."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def external_hash(key: bytes) -> int:
    """The 64 bits of a block hash that events show (VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=1)."""
    return int.from_bytes(key[-8:], "big")


def encode(events: Sequence[Event], block_size: int, timestamp: float) -> bytes:
    """One payload with `events` in order."""
    batch = EventBatch(timestamp, [_wire(event, block_size) for event in events], 0)
    return msgspec.msgpack.encode(batch)


def _wire(event: Event, block_size: int) -> BlockStored | BlockRemoved | AllBlocksCleared:
    match event:
        case Stored(hashes, parent, tokens, salts, adapter):
            return BlockStored(
                block_hashes=[external_hash(key) for key in hashes],
                parent_block_hash=None if parent is None else external_hash(parent),
                token_ids=tokens,
                block_size=block_size,
                lora_id=None if adapter is None else adapter.number,
                medium="GPU",
                lora_name=None if adapter is None else adapter.name,
                extra_keys=[_extra_keys(adapter, salt) for salt in salts],
                group_idx=0,
                kv_cache_spec_kind="full_attention",
            )
        case Removed(key):
            return BlockRemoved(block_hashes=[external_hash(key)], medium="GPU", group_idx=0)
        case Cleared():
            return AllBlocksCleared()


def _extra_keys(adapter: Adapter | None, salt: str | None) -> list[Any] | None:
    """What a block's hash covers beside its tokens, as events show it."""
    shown = [None if adapter is None else adapter.name, salt]
    return [each for each in shown if each is not None] or None


class EventPublisher:
    """Publishes batches and answers replays; lives on one event loop."""

    def __init__(self, config: KVEventsConfig, block_size: int) -> None:
        self._block_size = block_size
        self._topic = config.topic.encode()
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._next = 0
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(config.hwm)
        self._pub.linger = 0
        self._router: zmq.asyncio.Socket | None = None
        self._replays: asyncio.Task[None] | None = None
        try:
            if binds(config.endpoint):
                self._pub.bind(config.endpoint)
            else:
                self._pub.connect(config.endpoint)
            if config.replay_endpoint is not None:
                self._router = zmq.asyncio.Context(self._context).socket(zmq.ROUTER)
                self._router.linger = 0
                self._router.bind(config.replay_endpoint)
        except zmq.ZMQError as error:
            self.close()
            where = f"{config.endpoint}, replay {config.replay_endpoint}"
            raise OSError(f"--kv-events-config: {where}: {error}") from error

    def start(self) -> None:
        """Begins to answer replays."""
        if self._router is not None:
            self._replays = asyncio.get_running_loop().create_task(self._answer(self._router))

    def publish(self, events: Sequence[Event], timestamp: float) -> None:
        """Sends one batch; never blocks (a slow subscriber loses messages and sees a gap)."""
        number = self._next.to_bytes(8, "big")
        payload = encode(events, self._block_size, timestamp)
        self._next += 1
        self._buffer.append((number, payload))
        self._pub.send_multipart((self._topic, number, payload), copy=True)

    def close(self) -> None:
        """Closes the sockets; batches that are still on their way may be lost, as vLLM's are."""
        if self._replays is not None:
            self._replays.cancel()
        if self._router is not None:
            self._router.close()
        self._pub.close()
        self._context.term()

    async def _answer(self, router: zmq.asyncio.Socket) -> None:
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                log.warning("replay request with %d frames ignored", len(frames))
                continue
            client, _empty, first = frames
            for number, payload in list(self._buffer):
                if number >= first:  # big-endian, so bytes compare as numbers do
                    await router.send_multipart((client, b"", self._topic, number, payload))
            await router.send_multipart((client, b"", b"", END_OF_REPLAY, b""))


def binds(endpoint: str) -> bool:
    """Whether an endpoint is bound (True) or connected to."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def sources(config: KVEventsConfig | None) -> dict[str, Any]:
    """The answer of /kv_event_sources: settings by data-parallel rank; empty if events are off."""
    if config is None or not config.publishes:
        return {}
    shown: dict[str, Any] = json.loads(msgspec.json.encode(config))
    return {"0": {**shown, "publisher": "zmq"}}
