"""The stream over real ZeroMQ sockets: snapshots, restarts, counting, silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
import zmq
from dynamo_kv_router.stream import publisher as publisher_module
from dynamo_kv_router.stream import subscriber as subscriber_module
from dynamo_kv_router.stream.format import (
    LIVE_TOPIC,
    Accepted,
    Cleared,
    Event,
    Finished,
    FirstToken,
    InFlight,
    Info,
    Load,
    Removed,
    Snapshot,
    Stored,
    WorkerInfo,
    unpack_keys,
)
from dynamo_kv_router.stream.publisher import WorkerPublisher
from dynamo_kv_router.stream.subscriber import WorkerSubscriber

HOST = "127.83.0.1"


def worker_info(worker: str = "pod-0") -> WorkerInfo:
    return WorkerInfo(
        worker=worker,
        model="tiny",
        models=["tiny"],
        block_size=16,
        total_blocks=100,
        max_model_len=4096,
        max_num_batched_tokens=2048,
        runtime="sim",
    )


class View:
    """What a picker knows of one worker, and a way to wait for a state of it."""

    def __init__(self) -> None:
        self.keys: set[int] | None = None
        self.bookings: dict[str, InFlight] = {}
        self.load: Load | None = None
        self.info: WorkerInfo | None = None
        self.lost: list[str] = []
        self.snapshots = 0
        self.events = 0
        self._changed = asyncio.Event()

    def on_snapshot(self, worker: str, snapshot: Snapshot) -> None:
        self.keys = set(unpack_keys(snapshot.keys).tolist())
        self.bookings = {b.booking: b for b in snapshot.bookings}
        self.load = snapshot.load
        self.info = snapshot.info
        self.snapshots += 1
        self._changed.set()

    def on_events(self, worker: str, events: list[Event]) -> None:
        assert self.keys is not None, "events without a snapshot before"
        for event in events:
            self.events += 1
            match event:
                case Stored(keys):
                    self.keys.update(unpack_keys(keys).tolist())
                case Removed(keys):
                    self.keys.difference_update(unpack_keys(keys).tolist())
                case Cleared():
                    self.keys.clear()
                case Accepted(booking, prompt, cached):
                    self.bookings[booking] = InFlight(booking, prompt, cached)
                case FirstToken(booking):
                    b = self.bookings[booking]
                    self.bookings[booking] = InFlight(
                        booking, b.prompt_tokens, b.cached_tokens, True
                    )
                case Finished(booking):
                    self.bookings.pop(booking)
                case Load():
                    self.load = event
                case Info(info):
                    self.info = info
        self._changed.set()

    def on_doubt(self, worker: str, reason: str) -> None:
        pass

    def on_lost(self, worker: str, reason: str) -> None:
        self.keys = None
        self.bookings = {}
        self.lost.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@asynccontextmanager
async def published(
    context: zmq.Context, address: str = f"tcp://{HOST}:0", **arguments: object
) -> AsyncIterator[WorkerPublisher]:
    info = arguments.pop("info", worker_info())
    publisher = WorkerPublisher(address, info, context=context, **arguments)
    async with asyncio.timeout(10):
        while True:
            try:
                await publisher.start()
                break
            except OSError:  # ZeroMQ frees the address of a closed socket in the background
                if address.endswith(":0"):
                    raise
                await asyncio.sleep(0.02)
    try:
        yield publisher
    finally:
        await publisher.stop()


@asynccontextmanager
async def subscribed(
    context: zmq.Context, address: str, worker: str = "pod-0", **arguments: object
) -> AsyncIterator[tuple[View, WorkerSubscriber]]:
    view = View()
    subscriber = WorkerSubscriber(worker, address, view, context=context, **arguments)
    await subscriber.start()
    try:
        yield view, subscriber
    finally:
        await subscriber.stop()


async def test_late_subscriber_gets_the_whole_state(context):
    async with published(context) as publisher:
        publisher.store([1, 2, 3, 2**64 - 1])
        publisher.remove([2])
        publisher.accepted("r-1", 100, 32)
        publisher.accepted("r-2", 50, 0)
        publisher.first_token("r-1")
        publisher.set_load(Load(running=2, kv_blocks_used=3, kv_blocks_total=100))
        async with subscribed(context, publisher.endpoint) as (view, _):
            await view.until(lambda: view.snapshots == 1)
            assert view.keys == {1, 3, 2**64 - 1}
            assert view.bookings == {
                "r-1": InFlight("r-1", 100, 32, True),
                "r-2": InFlight("r-2", 50, 0),
            }
            assert view.load is not None
            assert (view.load.running, view.load.pickers) == (2, 1)
            assert view.info == worker_info()


async def test_live_events_follow_the_snapshot(context):
    async with (
        published(context) as publisher,
        subscribed(context, publisher.endpoint) as (view, _),
    ):
        await view.until(lambda: view.snapshots == 1)
        publisher.store([5, 6])
        publisher.accepted("r-1", 10, 0)
        await view.until(lambda: view.keys == {5, 6} and "r-1" in view.bookings)
        publisher.remove([5])
        publisher.first_token("r-1")
        await view.until(lambda: view.keys == {6} and view.bookings["r-1"].first_token)
        publisher.finished("r-1", prompt_tokens=10, cached_tokens=0, completion_tokens=3)
        await view.until(lambda: view.bookings == {})
        publisher.clear()
        await view.until(lambda: view.keys == set())
        publisher.set_draining()
        await view.until(lambda: view.load is not None and view.load.draining)
        info = WorkerInfo(
            worker="pod-0",
            model="tiny",
            models=["tiny", "adapter"],
            block_size=16,
            total_blocks=100,
            max_model_len=4096,
            max_num_batched_tokens=2048,
            runtime="sim",
        )
        publisher.set_info(info)
        await view.until(lambda: view.info == info)
        assert view.snapshots == 1
        assert view.lost == []


async def test_subscriber_before_publisher(context):
    probe = context.socket(zmq.XPUB)
    port = probe.bind_to_random_port(f"tcp://{HOST}")
    probe.close(linger=0)
    address = f"tcp://{HOST}:{port}"
    async with (
        subscribed(context, address) as (view, _),
        published(context, address) as publisher,
    ):
        publisher.store([9])
        await view.until(lambda: view.keys == {9})


async def test_one_tick_makes_one_batch(context):
    async with (
        published(context, epoch=7) as publisher,
        subscribed(context, publisher.endpoint) as (view, _),
    ):
        await view.until(lambda: view.snapshots == 1)
        before = publisher.session.seq
        for key in range(100):
            publisher.store([key])
        await view.until(lambda: view.keys == set(range(100)))
        assert publisher.session.seq == before + 1
        assert view.events <= 2  # one Stored, and a Load that counts the picker


async def test_pickers_are_counted_and_observers_are_not(context):
    counts: list[int] = []
    async with published(context, on_pickers=counts.append) as publisher:
        assert not publisher.picker_seen.is_set()
        async with subscribed(context, publisher.endpoint, role="observer") as (observer, _):
            await observer.until(lambda: observer.snapshots == 1)
            assert publisher.picker_count == 0
            async with subscribed(context, publisher.endpoint) as (view, _):
                await view.until(lambda: view.snapshots == 1)
                assert publisher.picker_count == 1
                assert publisher.picker_seen.is_set()
                async with subscribed(context, publisher.endpoint) as (other, _):
                    await other.until(lambda: other.snapshots == 1)
                    await view.until(lambda: view.load is not None and view.load.pickers == 2)
                await view.until(lambda: view.load is not None and view.load.pickers == 1)
            await observer.until(lambda: observer.load is not None and observer.load.pickers == 0)
            assert publisher.picker_seen.is_set()
    assert counts == [1, 2, 1, 0]


async def test_publisher_restart_replaces_the_view(context):
    async with published(context) as publisher:
        address = publisher.endpoint
        async with subscribed(context, address) as (view, _):
            publisher.store([1, 2])
            await view.until(lambda: view.keys == {1, 2})
            await publisher.stop()
            async with published(context, address) as again:
                again.store([7])
                await view.until(lambda: view.keys == {7})
                assert again.picker_count == 1


async def test_engine_restart_clears_the_view(context):
    async with (
        published(context) as publisher,
        subscribed(context, publisher.endpoint) as (view, _),
    ):
        publisher.store([1, 2])
        publisher.accepted("r-1")
        await view.until(lambda: view.keys == {1, 2})
        publisher.restart_epoch()
        publisher.store([3])
        await view.until(lambda: view.keys == {3})
        assert view.bookings == {}
        assert view.lost == ["restarted"]


async def test_silence_is_noticed_and_recovered_from(context, monkeypatch):
    monkeypatch.setattr(publisher_module, "HEARTBEAT_S", 60.0)
    async with (
        published(context) as publisher,
        subscribed(context, publisher.endpoint, stale_s=0.3) as (view, _),
    ):
        publisher.store([1])
        await view.until(lambda: view.keys == {1})
        await view.until(lambda: view.lost == ["nothing heard for 0.3 s"])
        # The fresh question is answered at once, since the worker is there after all.
        await view.until(lambda: view.keys == {1})


async def test_a_reader_too_slow_misses_messages_and_resyncs(context, monkeypatch):
    """A subscriber whose queue overflows ends with the right view all the same."""
    monkeypatch.setattr(publisher_module, "QUEUE_MESSAGES", 8)
    monkeypatch.setattr(subscriber_module, "QUEUE_MESSAGES", 8)
    async with published(context) as publisher:
        view = View()
        subscriber = WorkerSubscriber("pod-0", publisher.endpoint, view, context=context)
        await subscriber.start()
        try:
            await view.until(lambda: view.snapshots == 1)
            # More than both ends' queues and the kernel's buffers hold, with nobody reading:
            # flushed without giving the loop a turn.
            many = np.arange(100, 100 + 16_384, dtype=np.uint64)
            for _ in range(400):
                publisher.store(many)
                publisher._flush()
            publisher.clear()
            publisher.store([42])
            await view.until(lambda: view.keys == {42}, timeout=30)
            assert subscriber.session.gaps >= 1
            assert view.snapshots >= 2
        finally:
            await subscriber.stop()


async def test_another_pod_at_the_address_is_refused(context):
    async with (
        published(context, info=worker_info("other-pod")) as publisher,
        subscribed(context, publisher.endpoint, worker="pod-0") as (view, subscriber),
    ):
        await view.until(lambda: bool(view.lost))
        assert view.snapshots == 0
        assert "other-pod" in view.lost[0]
        assert subscriber.session.problem == view.lost[0]


async def test_garbage_is_refused_and_reported(context):
    raw = context.socket(zmq.XPUB)
    raw.setsockopt(zmq.XPUB_VERBOSER, 1)
    port = raw.bind_to_random_port(f"tcp://{HOST}")
    try:
        async with subscribed(context, f"tcp://{HOST}:{port}") as (view, subscriber):
            assert await asyncio.to_thread(raw.recv) == b"\x01" + LIVE_TOPIC
            raw.send_multipart([LIVE_TOPIC, b"not msgpack"])
            await view.until(lambda: bool(view.lost))
            assert view.snapshots == 0
            assert "undecodable" in view.lost[0]
            assert subscriber.session.undecodable == 1
    finally:
        raw.close(linger=0)


async def test_address_in_use_is_an_error_that_names_it(context):
    async with published(context) as publisher:
        second = WorkerPublisher(publisher.endpoint, worker_info(), context=context)
        with pytest.raises(OSError, match=publisher.endpoint):
            await second.start()


async def test_events_before_start_are_in_the_first_snapshot(context):
    publisher = WorkerPublisher(f"tcp://{HOST}:0", worker_info(), context=context)
    publisher.store([4])
    await publisher.start()
    try:
        async with subscribed(context, publisher.endpoint) as (view, _):
            await view.until(lambda: view.keys == {4})
    finally:
        await publisher.stop()
        await publisher.stop()
