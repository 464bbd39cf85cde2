"""Wire format of the worker event stream: one place that encodes and decodes it.

Messages are msgpack arrays (msgspec `array_like`), so a message costs no field names on the wire.
Fields may be appended with a default; decoders ignore what they don't know at the end.

Topics (first frame of each message):

- `e`: live `Batch`es, for everybody.
- `s/<role>/<subscriber>/<attempt>`: a `Snapshot`, for the one subscriber that asked. The
  subscription itself is the question. `role` is `picker` or `observer`; only pickers count
  for readiness and for `Load.pickers`. `attempt` has a fixed width, because ZeroMQ matches
  subscriptions by prefix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

Role = Literal["picker", "observer"]

LIVE_TOPIC = b"e"
SNAPSHOT_PREFIX = b"s/"
UNKNOWN = -1
"""A count that the worker does not know."""

_KEY_DTYPE = np.dtype("<u8")


class WorkerInfo(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What the worker is. Part of every snapshot; a change is sent as an `Info` event."""

    worker: str
    """Pod name, unique."""
    model: str
    """Served model name."""
    models: list[str] = []
    """Every name it answers to: aliases and LoRA adapters, `model` included."""
    block_size: int
    """Tokens per KV block."""
    total_blocks: int
    """KV blocks of the engine; 0 = unknown."""
    max_model_len: int
    """Tokens, prompt and answer together; 0 = unknown."""
    max_num_batched_tokens: int
    """Tokens per engine step; 0 = unknown."""
    runtime: str
    """`vllm` or `sim`."""
    tokenizer: dict[str, str] = {}
    """File name -> sha256, served at `http://<pod>:<status_port>/tokenizer/<name>`."""
    tokenizer_settings: dict[str, str] = {}
    """Such as `{"chat_template_content_format": "auto"}`."""
    exact_events: bool = True
    """False while the launcher cannot chain all of the engine's events."""
    loras: list[str] = []
    """Those of `models` that are LoRA adapters: their block keys have seeds of their own."""


class Stored(msgspec.Struct, array_like=True, frozen=True, tag="+"):
    """Blocks that entered the cache. `keys`: uint64, little endian, concatenated."""

    keys: bytes


class Removed(msgspec.Struct, array_like=True, frozen=True, tag="-"):
    """Blocks that left the cache. `keys` as in `Stored`."""

    keys: bytes


class Cleared(msgspec.Struct, array_like=True, frozen=True, tag="0"):
    """Every block left the cache."""


class Accepted(msgspec.Struct, array_like=True, frozen=True, tag="a"):
    """A request arrived at the engine."""

    booking: str
    """As the picker minted it, or the worker if the request came past every picker."""
    prompt_tokens: int = UNKNOWN
    cached_tokens: int = UNKNOWN


class FirstToken(msgspec.Struct, array_like=True, frozen=True, tag="f"):
    """The request's first output token left the engine: its prefill is done."""

    booking: str
    prefillers_failed: tuple[str, ...] = ()
    """`ip:port` of the prefill workers that this one asked in vain."""


class Finished(msgspec.Struct, array_like=True, frozen=True, tag="x"):
    """The request left the engine. Token counts are the engine's own, -1 where it said none."""

    booking: str
    prompt_tokens: int = UNKNOWN
    cached_tokens: int = UNKNOWN
    completion_tokens: int = UNKNOWN
    status: int = 200
    """HTTP status of the answer; 499 = the client left."""
    prefillers_failed: tuple[str, ...] = ()
    """As of `FirstToken`, where there was none."""


class Load(msgspec.Struct, array_like=True, frozen=True, tag="l"):
    """The worker's load. `-1` in `age_s` means that no load was observed yet."""

    running: int = 0
    waiting: int = 0
    active_prefill_tokens: int = 0
    active_decode_blocks: int = 0
    active_requests: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    pickers: int = 0
    """Live pickers that are subscribed to this worker."""
    draining: bool = False
    age_s: float = -1.0
    """Seconds between observation of the figures and sending them."""


class Info(msgspec.Struct, array_like=True, frozen=True, tag="i"):
    """The worker's description changed (an adapter was loaded, events became exact, ...)."""

    info: WorkerInfo


Event = Stored | Removed | Cleared | Accepted | FirstToken | Finished | Load | Info


class Batch(msgspec.Struct, array_like=True, frozen=True):
    """What happened since the batch before. A batch without events is a heartbeat."""

    epoch: int
    """Random, another one for each start of launcher or engine (63 bits)."""
    seq: int
    """1 for the first batch of an epoch, then without gaps."""
    ts: float
    """Unix time of sending, seconds."""
    events: list[Event]


class InFlight(msgspec.Struct, array_like=True, frozen=True):
    """A request that the engine has and has not finished."""

    booking: str
    prompt_tokens: int = UNKNOWN
    cached_tokens: int = UNKNOWN
    first_token: bool = False
    """True once its prefill is done."""


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """The worker's whole state after batch `seq` of `epoch`."""

    epoch: int
    seq: int
    """Last batch included; 0 = none was sent in this epoch."""
    ts: float
    info: WorkerInfo
    keys: bytes
    """Every cached block, as in `Stored`, in no particular order."""
    load: Load
    bookings: list[InFlight] = []


class Undecodable(ValueError):
    """A message that is not of this format: another protocol, or an incompatible version."""


_encoder = msgspec.msgpack.Encoder()
_batch_decoder = msgspec.msgpack.Decoder(Batch)
_snapshot_decoder = msgspec.msgpack.Decoder(Snapshot)


def encode(message: Batch | Snapshot) -> bytes:
    return _encoder.encode(message)


def decode_batch(payload: bytes) -> Batch:
    """Raises Undecodable."""
    try:
        return _batch_decoder.decode(payload)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Undecodable(f"batch: {error}") from error


def decode_snapshot(payload: bytes) -> Snapshot:
    """Raises Undecodable."""
    try:
        return _snapshot_decoder.decode(payload)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Undecodable(f"snapshot: {error}") from error


def pack_keys(keys: npt.NDArray[np.uint64] | Iterable[int]) -> bytes:
    """Block keys -> bytes, 8 per key, little endian."""
    if isinstance(keys, np.ndarray):
        return keys.astype(_KEY_DTYPE, copy=False).tobytes()
    return np.fromiter(keys, dtype=_KEY_DTYPE).tobytes()


def unpack_keys(packed: bytes) -> npt.NDArray[np.uint64]:
    """Bytes -> uint64 array (read-only, shares the bytes). Raises Undecodable."""
    if len(packed) % 8:
        raise Undecodable(f"keys: {len(packed)} bytes, not a multiple of 8")
    return np.frombuffer(packed, dtype=_KEY_DTYPE)


def snapshot_topic(role: Role, subscriber: str, attempt: int) -> bytes:
    """The topic on which a subscriber asks for its snapshot and gets it.

    `subscriber` is unique per subscribing process and has no slash.
    """
    return f"s/{role}/{subscriber}/{attempt % 100_000_000:08d}".encode()


def parse_snapshot_topic(topic: bytes) -> tuple[str, str] | None:
    """(role, subscriber), or None if it is no snapshot topic."""
    parts = topic.split(b"/")
    if len(parts) != 4 or parts[0] != b"s":
        return None
    return parts[1].decode(errors="replace"), parts[2].decode(errors="replace")
