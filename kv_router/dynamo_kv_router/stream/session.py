"""The protocol of the worker event stream, both ends, without I/O.

Sockets lose messages when a reader is slow, repeat subscriptions after a reconnect, and mix what
is left of an old connection with a new one. Both ends here take frames, times and calls in and
give frames or actions out, so that every such order can be tested by calling them.

Rules:

1. The publisher numbers its batches 1, 2, 3, … within an epoch. State after batch n of an epoch
   is one thing only, and a snapshot says of which n it is.
2. A subscriber subscribes to the live topic first and to its own snapshot topic second. On one
   connection every batch after the snapshot's therefore arrives after it; earlier ones are
   dropped by number.
3. A missing number, or another epoch, means that something was lost: the subscriber asks again
   under a fresh topic, so that an answer to an older question cannot be taken for the new one.
   Until it comes, a view with a gap is better than none, but nobody may call it exact.
4. Silence for `stale_s` means that the view is worth nothing. The publisher sends at least one
   batch per `HEARTBEAT_S`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dynamo_kv_router.stream.format import (
    LIVE_TOPIC,
    Accepted,
    Batch,
    Cleared,
    Event,
    Finished,
    FirstToken,
    InFlight,
    Info,
    Load,
    Removed,
    Role,
    Snapshot,
    Stored,
    Undecodable,
    WorkerInfo,
    decode_batch,
    decode_snapshot,
    encode,
    pack_keys,
    parse_snapshot_topic,
    snapshot_topic,
)

HEARTBEAT_S = 1.0
STALE_S = 3.0
SNAPSHOT_TIMEOUT_S = 1.0
"""A snapshot that has not come by then, while other messages do, is asked for again. Each time that
this happens in a row it is waited for twice as long: a big one on a slow network takes its time."""
MAX_SNAPSHOT_TIMEOUT_S = 16.0
RESYNC_INTERVAL_S = 0.25
MAX_BATCH_KEYS = 16_384
MAX_BOOKINGS = 100_000
MAX_HELD_BATCHES = 1_024

Frames = tuple[bytes, bytes]


# --------------------------------------------------------------------------- subscriber


@dataclass(frozen=True, slots=True)
class Subscribe:
    topic: bytes


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    topic: bytes


@dataclass(frozen=True, slots=True)
class Replace:
    """Forget what is known of the worker; this is its whole state."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Apply:
    """These events follow, in order, on what is known."""

    events: list[Event]


@dataclass(frozen=True, slots=True)
class Doubt:
    """Something is missing in what is known of the worker; a `Replace` or a `Lost` follows."""

    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Forget what is known of the worker until the next `Replace`."""

    reason: str


Action = Subscribe | Unsubscribe | Replace | Apply | Doubt | Lost


class SubscriberSession:
    """One worker's stream as one subscriber sees it.

    `feed` and `tick` return what to do, in order. Between a `Lost` or a `Doubt` and the next
    `Replace` there is no `Apply`; no event is ever applied twice.

    worker: the name that the worker must have; "" accepts any. An address can be taken over by
      another pod.
    subscriber: unique per subscribing process; without slash.
    """

    __slots__ = (
        "_attempt",
        "_epoch",
        "_heard_at",
        "_held",
        "_known",
        "_live",
        "_patience_s",
        "_resync_at",
        "_resync_due",
        "_seq",
        "_stale_s",
        "_subscriber",
        "_topic",
        "gaps",
        "problem",
        "resyncs",
        "role",
        "undecodable",
        "worker",
    )

    def __init__(
        self, worker: str, *, subscriber: str, role: Role = "picker", stale_s: float = STALE_S
    ) -> None:
        if not subscriber or "/" in subscriber:
            raise ValueError(f"subscriber: {subscriber!r} must be non-empty and without '/'")
        self.worker = worker
        self.role = role
        self._subscriber = subscriber
        self._stale_s = stale_s
        self._attempt = 0
        self._topic = b""
        self._live = False  # a snapshot was applied and nothing is missing since
        self._known = False  # the listener holds a view (perhaps an old one)
        self._epoch = 0
        self._seq = 0
        self._held: deque[Batch] = deque(maxlen=MAX_HELD_BATCHES)
        self._heard_at = 0.0
        self._resync_at = 0.0
        self._resync_due = False
        self._patience_s = SNAPSHOT_TIMEOUT_S
        self.problem = ""  # why there is no view, after one was lost or refused
        self.gaps = 0
        self.resyncs = 0
        self.undecodable = 0

    @property
    def live(self) -> bool:
        """The view is complete and current."""
        return self._live

    @property
    def known(self) -> bool:
        """The listener holds a view; it may be about to be replaced."""
        return self._known

    def start(self, now: float) -> list[Action]:
        """First subscriptions. `now`: monotonic seconds."""
        self._heard_at = now
        self._resync_at = now
        self._topic = snapshot_topic(self.role, self._subscriber, self._attempt)
        return [Subscribe(LIVE_TOPIC), Subscribe(self._topic)]

    def feed(self, topic: bytes, payload: bytes, now: float) -> list[Action]:
        """One received message. `now`: monotonic seconds."""
        try:
            if topic == LIVE_TOPIC:
                self._heard_at = now
                return self._batch(decode_batch(payload), now)
            if topic == self._topic:
                self._heard_at = now
                return self._snapshot(decode_snapshot(payload), now)
        except Undecodable as error:
            self.undecodable += 1
            return self._refuse(f"undecodable message: {error}", now)
        return []  # the answer to an older question

    def tick(self, now: float) -> list[Action]:
        """To be called a few times a second. `now`: monotonic seconds."""
        if self._known and now - self._heard_at >= self._stale_s:
            return [*self._lose(f"nothing heard for {self._stale_s:g} s"), *self._resync(now)]
        if not self._live:
            heard = self._heard_at > self._resync_at
            overdue = heard and now - self._resync_at >= self._patience_s
            if overdue:
                self._patience_s = min(2 * self._patience_s, MAX_SNAPSHOT_TIMEOUT_S)
            if self._resync_due or overdue:
                return self._resync(now)
        return []

    def _batch(self, batch: Batch, now: float) -> list[Action]:
        if not self._live:
            self._held.append(batch)
            return []
        if batch.epoch != self._epoch:
            # The engine or its launcher began anew: what was cached is gone.
            self._held.append(batch)
            return [*self._lose("restarted"), *self._resync(now)]
        if batch.seq <= self._seq:
            return []
        if batch.seq != self._seq + 1:
            self.gaps += 1
            self._held.append(batch)
            missing = batch.seq - self._seq - 1
            reason = f"{missing} of its messages did not arrive"
            return [Doubt(reason), *self._resync(now)]
        self._seq = batch.seq
        return [Apply(batch.events)] if batch.events else []

    def _snapshot(self, snapshot: Snapshot, now: float) -> list[Action]:
        if self._live and snapshot.epoch == self._epoch and snapshot.seq <= self._seq:
            return []  # repeated after a reconnect; nothing was missed
        if self.worker and snapshot.info.worker != self.worker:
            return self._refuse(
                f"another worker answers at this address: {snapshot.info.worker!r}, "
                f"expected {self.worker!r}",
                now,
            )
        self._live = True
        self._known = True
        self.problem = ""
        self._resync_due = False
        self._patience_s = SNAPSHOT_TIMEOUT_S
        self._epoch = snapshot.epoch
        self._seq = snapshot.seq
        actions: list[Action] = [Replace(snapshot)]
        held, self._held = self._held, deque(maxlen=MAX_HELD_BATCHES)
        for batch in held:
            # Another epoch is left over from before; a later one shows itself by its next batch.
            if batch.epoch == self._epoch:
                actions += self._batch(batch, now)
        return actions

    def _refuse(self, reason: str, now: float) -> list[Action]:
        """Give up the view; what is wrong will not be better at once, so ask when overdue."""
        self._resync_at = now
        self._resync_due = False
        self._lose(reason)
        return [Lost(reason)]

    def _lose(self, reason: str) -> list[Action]:
        self._live = False
        self.problem = reason
        if not self._known:
            return []
        self._known = False
        return [Lost(reason)]

    def _resync(self, now: float) -> list[Action]:
        """Ask for a snapshot under a fresh topic, at most every RESYNC_INTERVAL_S."""
        self._live = False
        self._resync_due = now - self._resync_at < RESYNC_INTERVAL_S
        if self._resync_due:
            return []
        self._resync_at = now
        self._attempt += 1
        self.resyncs += 1
        old, self._topic = (
            self._topic,
            snapshot_topic(self.role, self._subscriber, self._attempt),
        )
        # The fresh one first, so that the publisher never counts this picker as gone.
        return [Subscribe(self._topic), Unsubscribe(old)]


# --------------------------------------------------------------------------- publisher


class PublisherSession:
    """One worker's state and the messages that tell it.

    Calls change the state and queue events; `flush` makes a batch of what is queued;
    `subscription` answers a subscriber. What is queued is bounded by flushing at
    MAX_BATCH_KEYS keys (`due`), requests in flight by MAX_BOOKINGS (the oldest is dropped).
    """

    __slots__ = (
        "_bookings",
        "_cached",
        "_draining",
        "_events",
        "_info",
        "_key_parts",
        "_key_tag",
        "_load",
        "_load_at",
        "_load_changed",
        "_queued_keys",
        "_snapshot",
        "_topics",
        "epoch",
        "seq",
    )

    def __init__(self, info: WorkerInfo, *, epoch: int) -> None:
        self._info = info
        self.epoch = epoch
        self.seq = 0
        self._cached: set[int] = set()
        self._bookings: dict[str, InFlight] = {}  # in order of arrival
        self._load = Load()
        self._load_at: float | None = None
        self._load_changed = False
        self._draining = False
        self._events: list[Event] = []
        # The run of equal key events at the end of what is queued, not yet one event.
        self._key_tag: Literal["", "+", "-"] = ""
        self._key_parts: list[bytes] = []
        self._queued_keys = 0
        self._topics: Counter[bytes] = Counter()
        self._snapshot: tuple[int, int, bytes] | None = None  # epoch, seq, encoded

    @property
    def info(self) -> WorkerInfo:
        return self._info

    @property
    def cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def bookings(self) -> tuple[InFlight, ...]:
        """Requests in flight, in order of arrival."""
        return tuple(self._bookings.values())

    @property
    def pickers(self) -> int:
        """Live pickers; one that resyncs or reconnects counts once."""
        names = set()
        for topic in self._topics:
            parsed = parse_snapshot_topic(topic)
            if parsed is not None and parsed[0] == "picker":
                names.add(parsed[1])
        return len(names)

    @property
    def due(self) -> bool:
        """So much is queued that it has to be sent at once."""
        return self._queued_keys >= MAX_BATCH_KEYS

    @property
    def pending(self) -> bool:
        """Something is queued."""
        return bool(self._events or self._key_parts or self._load_changed)

    # what happened at the engine

    def store(self, keys: npt.NDArray[np.uint64] | Sequence[int]) -> None:
        self._cached.update(keys.tolist() if isinstance(keys, np.ndarray) else keys)
        self._queue_keys("+", keys)

    def remove(self, keys: npt.NDArray[np.uint64] | Sequence[int]) -> None:
        self._cached.difference_update(keys.tolist() if isinstance(keys, np.ndarray) else keys)
        self._queue_keys("-", keys)

    def clear(self) -> None:
        self._cached.clear()
        self._close_keys()
        # Nothing that was queued about keys matters any more.
        self._events = [e for e in self._events if not isinstance(e, Stored | Removed | Cleared)]
        self._queued_keys = 0
        self._events.append(Cleared())

    def accepted(self, booking: str, prompt_tokens: int, cached_tokens: int) -> None:
        self._bookings[booking] = InFlight(booking, prompt_tokens, cached_tokens)
        if len(self._bookings) > MAX_BOOKINGS:
            del self._bookings[next(iter(self._bookings))]
        self._queue(Accepted(booking, prompt_tokens, cached_tokens))

    def first_token(self, booking: str, prefillers_failed: tuple[str, ...] = ()) -> None:
        known = self._bookings.get(booking)
        if known is not None:
            self._bookings[booking] = InFlight(
                booking, known.prompt_tokens, known.cached_tokens, True
            )
        self._queue(FirstToken(booking, prefillers_failed))

    def finished(self, event: Finished) -> None:
        self._bookings.pop(event.booking, None)
        self._queue(event)

    def set_load(self, load: Load, now: float) -> None:
        """`load`: the engine's figures; pickers, draining and age_s are filled in on sending."""
        self._load = load
        self._load_at = now
        self._load_changed = True

    def set_draining(self) -> None:
        self._draining = True
        self._load_changed = True

    def set_info(self, info: WorkerInfo) -> None:
        if info != self._info:
            self._info = info
            self._queue(Info(info))

    def restart_epoch(self, epoch: int) -> None:
        """The engine began anew: nothing is cached, nothing is running. The next batch says so."""
        self.epoch = epoch
        self.seq = 0
        self._cached.clear()
        self._bookings.clear()
        self._events.clear()
        self._key_parts.clear()
        self._key_tag = ""
        self._queued_keys = 0
        self._load = Load()
        self._load_at = None
        self._load_changed = True

    # what goes out

    def flush(self, now: float, ts: float, *, heartbeat: bool = False) -> Frames | None:
        """What is queued as one message, or None. A heartbeat always gives one, with the load.

        now: the clock of `set_load`; ts: Unix time.
        """
        self._close_keys()
        if self._load_changed or heartbeat:
            self._events.append(self._current_load(now))
            self._load_changed = False
        if not self._events:
            return None
        self.seq += 1
        events, self._events = self._events, []
        self._queued_keys = 0
        return LIVE_TOPIC, encode(Batch(self.epoch, self.seq, ts, events))

    def subscription(self, frame: bytes, now: float, ts: float) -> list[Frames]:
        """A subscription message of an XPUB socket: b"\\1" or b"\\0", then the topic.

        A subscription to a snapshot topic is answered: first what is queued, then the snapshot.
        """
        topic = frame[1:]
        if parse_snapshot_topic(topic) is None:
            return []
        before = self.pickers
        if frame[:1] == b"\x00":
            self._topics[topic] -= 1
            if self._topics[topic] <= 0:
                del self._topics[topic]
            self._load_changed |= self.pickers != before
            return []
        if frame[:1] != b"\x01":
            return []
        self._topics[topic] += 1
        self._load_changed |= self.pickers != before
        queued = self.flush(now, ts)
        answer = topic, self._encoded_snapshot(now, ts)
        return [queued, answer] if queued is not None else [answer]

    def _encoded_snapshot(self, now: float, ts: float) -> bytes:
        # After the flush the state belongs to (epoch, seq): pickers that ask together share it.
        if self._snapshot is not None and self._snapshot[:2] == (self.epoch, self.seq):
            return self._snapshot[2]
        snapshot = Snapshot(
            epoch=self.epoch,
            seq=self.seq,
            ts=ts,
            info=self._info,
            keys=pack_keys(self._cached),
            load=self._current_load(now),
            bookings=list(self._bookings.values()),
        )
        encoded = encode(snapshot)
        self._snapshot = (self.epoch, self.seq, encoded)
        return encoded

    def _current_load(self, now: float) -> Load:
        load = self._load
        return Load(
            running=load.running,
            waiting=load.waiting,
            active_prefill_tokens=load.active_prefill_tokens,
            active_decode_blocks=load.active_decode_blocks,
            active_requests=load.active_requests,
            kv_blocks_used=load.kv_blocks_used,
            kv_blocks_total=load.kv_blocks_total,
            pickers=self.pickers,
            draining=self._draining,
            age_s=-1.0 if self._load_at is None else max(0.0, now - self._load_at),
        )

    def _queue(self, event: Event) -> None:
        self._close_keys()
        self._events.append(event)

    def _queue_keys(
        self, tag: Literal["+", "-"], keys: npt.NDArray[np.uint64] | Iterable[int]
    ) -> None:
        packed = pack_keys(keys)
        if not packed:
            return
        if tag != self._key_tag:
            self._close_keys()
            self._key_tag = tag
        self._key_parts.append(packed)
        self._queued_keys += len(packed) // 8

    def _close_keys(self) -> None:
        if self._key_parts:
            packed = b"".join(self._key_parts)
            self._events.append(Stored(packed) if self._key_tag == "+" else Removed(packed))
            self._key_parts = []
        self._key_tag = ""
