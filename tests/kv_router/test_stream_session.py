"""The stream's protocol over a network that loses, repeats and mixes; no sockets, no clock."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from dynamo_kv_router.index import BlockIndex
from dynamo_kv_router.stream import session as session_module
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
    Stored,
    WorkerInfo,
    decode_batch,
    decode_snapshot,
    encode,
    unpack_keys,
)
from dynamo_kv_router.stream.session import (
    Apply,
    Doubt,
    Lost,
    PublisherSession,
    Replace,
    Subscribe,
    SubscriberSession,
    Unsubscribe,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

KEYS = range(1, 12)
WORKER = 3


def info(worker: str = "pod-0", models: tuple[str, ...] = ("tiny",)) -> WorkerInfo:
    return WorkerInfo(
        worker=worker,
        model="tiny",
        models=list(models),
        block_size=16,
        total_blocks=0,
        max_model_len=0,
        max_num_batched_tokens=0,
        runtime="sim",
    )


class Picker:
    """A subscriber with a real index, which fails if an event is applied twice or out of turn."""

    def __init__(self, name: str, now: float) -> None:
        self.session = SubscriberSession("pod-0", subscriber=name)
        self.index = BlockIndex()
        self.bookings: dict[str, InFlight] = {}
        self.info: WorkerInfo | None = None
        self.has_view = False
        self.doubted = False
        self.subscriptions: list[bytes] = []
        self.upstream: deque[bytes] = deque()
        self.connections: list[deque[tuple[bytes, bytes]]] = [deque()]  # the last is the current
        self.perform(self.session.start(now))

    def perform(self, actions) -> None:
        for action in actions:
            match action:
                case Subscribe(topic):
                    self.subscriptions.append(topic)
                    self.upstream.append(b"\x01" + topic)
                case Unsubscribe(topic):
                    self.subscriptions.remove(topic)
                    self.upstream.append(b"\x00" + topic)
                case Replace(snapshot):
                    self.has_view, self.doubted = True, False
                    self.index.clear(WORKER)
                    self.index.store(WORKER, unpack_keys(snapshot.keys))
                    self.bookings = {b.booking: b for b in snapshot.bookings}
                    self.info = snapshot.info
                case Apply(events):
                    assert self.has_view
                    assert not self.doubted
                    for event in events:
                        self.apply(event)
                case Doubt():
                    assert self.has_view
                    self.doubted = True
                case Lost():
                    self.has_view = self.doubted = False
                    self.index.clear(WORKER)
                    self.bookings = {}

    def apply(self, event: Event) -> None:
        match event:
            case Stored(keys):
                self.index.store(WORKER, unpack_keys(keys))
            case Removed(keys):
                self.index.remove(WORKER, unpack_keys(keys))
            case Cleared():
                self.index.clear(WORKER)
            case Accepted(booking, prompt, cached):
                assert booking not in self.bookings
                self.bookings[booking] = InFlight(booking, prompt, cached)
            case FirstToken(booking):
                known = self.bookings[booking]
                assert not known.first_token
                self.bookings[booking] = InFlight(
                    booking, known.prompt_tokens, known.cached_tokens, True
                )
            case Finished(booking):
                del self.bookings[booking]
            case Info(description):
                self.info = description

    def keys(self) -> set[int]:
        return {key for key in KEYS if self.index.match([key])}


@dataclass
class World:
    """One worker at one address, restarted at will, and its pickers."""

    rng: random.Random
    now: float = 100.0
    epochs: int = 0
    requests: int = 0
    pickers: list[Picker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()
        self.pickers = [Picker(f"p{i}", self.now) for i in range(2)]

    def begin(self) -> None:
        self.epochs += 1
        self.publisher = PublisherSession(info(), epoch=self.epochs)

    def send(self, frames: tuple[bytes, bytes] | None) -> None:
        if frames is None:
            return
        for picker in self.pickers:
            if any(frames[0].startswith(topic) for topic in self.effective(picker)):
                picker.connections[-1].append(frames)

    def effective(self, picker: Picker) -> list[bytes]:
        """Subscriptions that have reached the publisher on the current connection."""
        topics = list(picker.subscriptions)
        for message in picker.upstream:
            if message[:1] == b"\x01":
                if message[1:] in topics:
                    topics.remove(message[1:])
            else:
                topics.append(message[1:])
        return topics

    def deliver_upstream(self, picker: Picker) -> None:
        message = picker.upstream.popleft()
        for frames in self.publisher.subscription(message, self.now, self.now):
            self.send(frames)

    def deliver(self, picker: Picker, connection: int) -> None:
        queue = picker.connections[connection]
        topic, payload = queue.popleft()
        picker.perform(picker.session.feed(topic, payload, self.now))

    def disconnect(self, picker: Picker) -> None:
        """The publisher sees every subscription of the connection go; then all come again."""
        gone = self.effective(picker)
        for topic in gone:
            self.publisher.subscription(b"\x00" + topic, self.now, self.now)
        self.reconnect(picker)

    def reconnect(self, picker: Picker) -> None:
        picker.connections.append(deque())
        picker.connections = [q for q in picker.connections[:-1] if q] + picker.connections[-1:]
        picker.upstream = deque(b"\x01" + topic for topic in picker.subscriptions)

    def settle(self) -> None:
        """No more losses: everything arrives, time passes, heartbeats come."""
        for _ in range(40):
            self.now += 0.3
            self.send(self.publisher.flush(self.now, self.now, heartbeat=True))
            for picker in self.pickers:
                picker.perform(picker.session.tick(self.now))
                while picker.upstream or any(picker.connections):
                    while picker.upstream:
                        self.deliver_upstream(picker)
                    for index, queue in enumerate(picker.connections):
                        while queue:
                            self.deliver(picker, index)
        self.check()

    def check(self) -> None:
        for picker in self.pickers:
            assert picker.session.live
            assert picker.has_view
            assert picker.keys() == self.publisher._cached
            assert picker.index.blocks(WORKER) == self.publisher.cached_blocks
            assert picker.bookings == {b.booking: b for b in self.publisher.bookings}
            assert picker.info == self.publisher.info
        assert self.publisher.pickers == len(self.pickers)


pickers = st.integers(0, 1)


class StreamMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed):
        self.world = World(random.Random(seed))

    # the worker lives

    @rule(keys=st.sets(st.sampled_from(KEYS)))
    def store(self, keys):
        fresh = sorted(keys - self.world.publisher._cached)
        self.world.publisher.store(np.array(fresh, dtype=np.uint64))

    @rule(keys=st.sets(st.sampled_from(KEYS)))
    def remove(self, keys):
        self.world.publisher.remove(sorted(keys & self.world.publisher._cached))

    @rule()
    def clear(self):
        self.world.publisher.clear()

    @rule()
    def accept(self):
        self.world.requests += 1
        self.world.publisher.accepted(f"r-{self.world.requests}", self.world.requests, 0)

    @rule()
    def first_token(self):
        waiting = [b.booking for b in self.world.publisher.bookings if not b.first_token]
        if waiting:
            self.world.publisher.first_token(waiting[0])

    @rule()
    def finish(self):
        if self.world.publisher.bookings:
            self.world.publisher.finished(Finished(self.world.publisher.bookings[-1].booking))

    @rule(adapter=st.sampled_from(["x", "y"]))
    def describe(self, adapter):
        self.world.publisher.set_info(info(models=("tiny", adapter)))

    @rule(heartbeat=st.booleans())
    def flush(self, heartbeat):
        world = self.world
        world.send(world.publisher.flush(world.now, world.now, heartbeat=heartbeat))

    @rule()
    def engine_restarts(self):
        self.world.epochs += 1
        self.world.publisher.restart_epoch(self.world.epochs)

    @rule()
    def launcher_restarts(self):
        self.world.begin()
        for picker in self.world.pickers:
            self.world.reconnect(picker)

    # the network

    @rule(picker=pickers, count=st.integers(1, 5))
    def upstream(self, picker, count):
        for _ in range(count):
            if self.world.pickers[picker].upstream:
                self.world.deliver_upstream(self.world.pickers[picker])

    @rule(picker=pickers, count=st.integers(1, 8))
    def downstream(self, picker, count):
        for _ in range(count):
            target = self.world.pickers[picker]
            filled = [index for index, queue in enumerate(target.connections) if queue]
            if filled:
                self.world.deliver(target, self.world.rng.choice(filled))

    @rule(picker=pickers, at=st.integers(0, 20))
    def lose(self, picker, at):
        queue = self.world.pickers[picker].connections[-1]
        if queue:
            del queue[at % len(queue)]

    @rule(picker=pickers)
    def connection_breaks(self, picker):
        self.world.disconnect(self.world.pickers[picker])

    @rule(seconds=st.sampled_from([0.01, 0.3, 2.0, 6.0]))
    def time_passes(self, seconds):
        self.world.now += seconds
        for picker in self.world.pickers:
            picker.perform(picker.session.tick(self.world.now))

    @rule()
    def settle(self):
        self.world.settle()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.settle()


TestStream = StreamMachine.TestCase
TestStream.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


# --- single rules, spelled out


def live_session() -> tuple[PublisherSession, SubscriberSession]:
    publisher = PublisherSession(info(), epoch=1)
    session = SubscriberSession("pod-0", subscriber="p")
    topic = session.start(0.0)[1].topic
    for frames in publisher.subscription(b"\x01" + topic, 0.0, 0.0):
        session.feed(*frames, 0.0)
    assert session.live
    return publisher, session


def test_a_gap_asks_under_a_fresh_topic_and_keeps_the_view():
    publisher, session = live_session()
    publisher.store([1])
    publisher.flush(1.0, 1.0)  # lost
    publisher.store([2])
    actions = session.feed(*publisher.flush(1.0, 1.0), 1.0)
    match actions:
        case [Doubt(reason), Subscribe(fresh), Unsubscribe(old)]:
            assert reason == "1 of its messages did not arrive"
            assert fresh != old
        case _:
            pytest.fail(f"{actions}")
    assert session.gaps == 1
    assert session.known
    assert not session.live
    # The late answer to the old question is not taken for the new one.
    assert session.feed(old, publisher.subscription(b"\x01" + old, 1.0, 1.0)[-1][1], 1.0) == []


def test_resyncs_do_not_storm():
    publisher, session = live_session()
    asked = 0
    for step in range(100):
        publisher.store([step])
        if step % 2:
            now = 1.0 + step / 1000
            for action in session.feed(*publisher.flush(now, now), now):
                if isinstance(action, Subscribe):
                    asked += 1
                    topic = action.topic
                    for frames in publisher.subscription(b"\x01" + topic, now, now):
                        session.feed(*frames, now)
        else:
            publisher.flush(1.0, 1.0)
    assert asked == 1
    assert [type(a) for a in session.tick(1.1 + session_module.RESYNC_INTERVAL_S)] == [
        Subscribe,
        Unsubscribe,
    ]


def test_a_lost_snapshot_is_asked_for_again_and_more_patiently_each_time():
    publisher, session = PublisherSession(info(), epoch=1), SubscriberSession("", subscriber="p")
    session.start(0.0)
    batch = encode(Batch(1, 1, 0.0, []))
    asked = []
    for tenth in range(1, 600):
        now = tenth / 10
        session.feed(LIVE_TOPIC, batch, now)
        if actions := session.tick(now):
            assert [type(a) for a in actions] == [Subscribe, Unsubscribe]
            asked.append(now)
            topic = actions[0].topic
    assert asked == [1, 3, 7, 15, 31, 47]
    session.feed(*publisher.subscription(b"\x01" + topic, 60.0, 60.0)[-1], 60.0)
    assert session.live
    session.feed(LIVE_TOPIC, encode(Batch(1, 9, 60.0, [])), 61.0)  # lost ones before it
    assert not session.live
    session.feed(LIVE_TOPIC, batch, 61.5)
    assert session.tick(61.9) == []
    assert session.tick(62.0) != []


def test_nothing_is_asked_while_nobody_is_there():
    session = SubscriberSession("pod-0", subscriber="p")
    session.start(0.0)
    assert all(session.tick(float(second)) == [] for second in range(100))


def test_clear_drops_what_was_queued_about_keys():
    publisher = PublisherSession(info(), epoch=1)
    publisher.store([1, 2])
    publisher.accepted("r", 1, 0)
    publisher.remove([1])
    publisher.clear()
    publisher.store([3])
    batch = decode_batch(publisher.flush(0.0, 0.0)[1])
    assert [type(event) for event in batch.events] == [Accepted, Cleared, Stored]


def test_runs_of_key_events_become_one_and_keep_their_order():
    publisher = PublisherSession(info(), epoch=1)
    publisher.store([1])
    publisher.store(np.array([2, 3], dtype=np.uint64))
    publisher.remove([2])
    publisher.store([2])
    batch = decode_batch(publisher.flush(0.0, 5.0)[1])
    assert [(type(e), unpack_keys(e.keys).tolist()) for e in batch.events] == [
        (Stored, [1, 2, 3]),
        (Removed, [2]),
        (Stored, [2]),
    ]
    assert (batch.epoch, batch.seq, batch.ts) == (1, 1, 5.0)
    assert publisher.flush(0.0, 0.0) is None


def test_load_carries_its_age_and_the_pickers():
    publisher = PublisherSession(info(), epoch=1)
    first = decode_batch(publisher.flush(0.0, 0.0, heartbeat=True)[1]).events
    assert first == [Load(age_s=-1.0)]
    publisher.set_load(Load(running=2), 10.0)
    publisher.subscription(b"\x01s/picker/a/00000000", 10.0, 10.0)
    publisher.subscription(b"\x01s/picker/a/00000001", 10.0, 10.0)
    publisher.subscription(b"\x01s/observer/b/00000000", 10.0, 10.0)
    second = decode_batch(publisher.flush(12.5, 12.5, heartbeat=True)[1]).events
    assert second == [Load(running=2, pickers=1, age_s=2.5)]


def test_pickers_that_ask_together_share_one_snapshot():
    publisher = PublisherSession(info(), epoch=1)
    publisher.store(range(1000))
    (_, (_, first)) = publisher.subscription(b"\x01s/observer/a/00000000", 0.0, 0.0)
    ((_, second),) = publisher.subscription(b"\x01s/observer/b/00000000", 0.0, 0.0)
    assert first is second
    assert set(unpack_keys(decode_snapshot(first).keys).tolist()) == set(range(1000))


def test_bookings_are_bounded(monkeypatch):
    monkeypatch.setattr(session_module, "MAX_BOOKINGS", 10)
    publisher = PublisherSession(info(), epoch=1)
    for number in range(25):
        publisher.accepted(f"r-{number}", 1, 0)
    assert [b.booking for b in publisher.bookings] == [f"r-{n}" for n in range(15, 25)]


def test_a_subscriber_needs_a_name_without_slash():
    with pytest.raises(ValueError, match="'a/b'"):
        SubscriberSession("w", subscriber="a/b")
