"""An engine's event socket, with what goes wrong on it: late starts, gaps, restarts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import zmq
import zmq.asyncio
from dynamo_kv_router.engine_events import (
    Caught,
    EngineBatch,
    EngineEventSource,
    Gap,
    Item,
    Missed,
    Restarted,
)

END = b"\xff" * 8


class FakeEngine:
    """vLLM's event publisher: PUB with numbers from 0, ROUTER that replays the last batches."""

    def __init__(self, folder: str, *, keep: int = 1_000, topic_in_replay: bool = True) -> None:
        self.events = f"ipc://{folder}/events"
        self.replay = f"ipc://{folder}/replay"
        self.keep = keep
        self.topic_in_replay = topic_in_replay
        self.topic = b"kv"
        self.seq = 0
        self.buffer: list[tuple[int, bytes]] = []
        self.replays = 0
        self.mute = False  # answers no request for a replay
        self.asked: asyncio.Queue[int] = asyncio.Queue()  # from where on
        self._tasks: list[asyncio.Task] = []

    async def start(self) -> None:
        context = zmq.asyncio.Context.instance()
        # XPUB is PUB that also says when somebody has subscribed.
        self._pub = context.socket(zmq.XPUB)
        self._pub.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._pub.bind(self.events)
        self._router = context.socket(zmq.ROUTER)
        self._router.bind(self.replay)
        self._tasks = [asyncio.create_task(self._serve())]

    async def subscribed(self) -> None:
        async with asyncio.timeout(10):
            while (await self._pub.recv())[:1] != b"\x01":
                pass

    async def _serve(self) -> None:
        while True:
            client, _, start = await self._router.recv_multipart()
            self.replays += 1
            self.asked.put_nowait(int.from_bytes(start, "big"))
            if self.mute:
                continue
            topic = [self.topic] if self.topic_in_replay else []
            for seq, payload in self.buffer:
                if seq >= int.from_bytes(start, "big"):
                    await self._router.send_multipart(
                        [client, b"", *topic, seq.to_bytes(8, "big"), payload]
                    )
            await self._router.send_multipart([client, b"", b"", END, b""])

    async def say(self, mark: int, *, lost: bool = False) -> None:
        """One batch whose event names block `mark`; a lost one is only in the replay buffer."""
        payload = msgspec.msgpack.encode(
            [0.0, [{"type": "BlockRemoved", "block_hashes": [mark], "medium": "GPU"}], 0]
        )
        await self.say_raw(payload, lost=lost)

    async def say_raw(self, payload: bytes, *, lost: bool = False) -> None:
        seq, self.seq = self.seq, self.seq + 1
        self.buffer = [*self.buffer, (seq, payload)][-self.keep :]
        if not lost:
            await self._pub.send_multipart([self.topic, seq.to_bytes(8, "big"), payload])

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._pub.close(linger=0)
        self._router.close(linger=0)


@asynccontextmanager
async def running(folder: object, **arguments) -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(str(folder), **arguments)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


class Listener:
    def __init__(self, source: EngineEventSource) -> None:
        self.source = source
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    async def run(self) -> None:
        async for item in self.source.batches():
            self._items.put_nowait(item)

    @property
    def waiting(self) -> int:
        return self._items.qsize()

    async def take(self, count: int) -> list[object]:
        """The next items; a batch is shown as (number, mark)."""
        shown: list[object] = []
        async with asyncio.timeout(10):
            while len(shown) < count:
                item = await self._items.get()
                if isinstance(item, EngineBatch):
                    shown.append((item.seq, item.events[0].block_hashes[0]))
                else:
                    shown.append(item)
        return shown


@asynccontextmanager
async def listening(
    engine: FakeEngine, *, replay: bool = True, **arguments
) -> AsyncIterator[Listener]:
    listener = Listener(
        EngineEventSource(engine.events, engine.replay if replay else None, **arguments)
    )
    task = asyncio.create_task(listener.run())
    try:
        yield listener
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("topic_in_replay", [True, False])
async def test_a_late_listener_gets_the_past_from_the_replay(tmp_path, topic_in_replay):
    async with running(tmp_path, topic_in_replay=topic_in_replay) as engine:
        await engine.say(100)
        await engine.say(101)
        async with listening(engine) as listener:
            assert await listener.take(3) == [(0, 100), (1, 101), Caught()]
            await engine.subscribed()
            await engine.say(102)
            assert await listener.take(1) == [(2, 102)]
            assert listener.source.gaps == 0


async def test_a_gap_is_filled(tmp_path):
    async with running(tmp_path) as engine, listening(engine) as listener:
        await engine.subscribed()
        assert await listener.take(1) == [Caught()]
        await engine.say(100)
        await engine.say(101, lost=True)
        await engine.say(102, lost=True)
        await engine.say(103)
        assert await listener.take(5) == [(0, 100), Gap(), (1, 101), (2, 102), (3, 103)]
        assert listener.source.gaps == 1


async def test_what_the_replay_has_no_more_is_missed(tmp_path):
    async with running(tmp_path, keep=2) as engine:
        for mark in range(5):
            await engine.say(mark)
        async with listening(engine) as listener:
            assert await listener.take(4) == [Missed(0, 2), (3, 3), (4, 4), Caught()]
            await engine.subscribed()
            for mark in range(5, 9):
                await engine.say(mark, lost=True)
            await engine.say(9)
            assert await listener.take(4) == [Gap(), Missed(5, 7), (8, 8), (9, 9)]


async def test_without_replay_a_gap_is_missed(tmp_path):
    async with running(tmp_path) as engine, listening(engine, replay=False) as listener:
        await engine.subscribed()
        await engine.say(0, lost=True)
        await engine.say(1)
        await engine.say(2)
        await engine.say(3, lost=True)
        await engine.say(4)
        assert await listener.take(5) == [Missed(0, 0), (1, 1), (2, 2), Missed(3, 3), (4, 4)]


@pytest.mark.parametrize("replay", [True, False])
async def test_an_engine_that_begins_anew(tmp_path, replay):
    async with running(tmp_path) as engine, listening(engine, replay=replay) as listener:
        await engine.subscribed()
        if replay:
            assert await listener.take(1) == [Caught()]
        for mark in range(3):
            await engine.say(mark)
        assert await listener.take(3) == [(0, 0), (1, 1), (2, 2)]
        await engine.stop()
        async with running(tmp_path) as again:
            await again.subscribed()
            await again.say(50)
            await again.say(51)
            assert await listener.take(3) == [Restarted(), (0, 50), (1, 51)]
        await engine.start()  # for its own end


@pytest.mark.parametrize("unheard", [1, 6])
async def test_an_engine_that_began_anew_unheard(tmp_path, unheard):
    """Its first batches came while we were cut off: fewer or more than the old one's."""
    async with running(tmp_path) as engine, listening(engine) as listener:
        await engine.subscribed()
        assert await listener.take(1) == [Caught()]
        for mark in range(3):
            await engine.say(mark)
        assert await listener.take(3) == [(0, 0), (1, 1), (2, 2)]
        await engine.stop()
        async with running(tmp_path) as again:
            await again.subscribed()
            for mark in range(unheard):
                await again.say(50 + mark, lost=True)
            await again.say(90)
            expected = [(mark, 50 + mark) for mark in range(unheard)]
            shown = [item for item in await listener.take(unheard + 3) if item != Gap()]
            assert shown == [Restarted(), *expected, (unheard, 90)]
        await engine.start()


async def test_a_lost_last_batch_is_asked_for_once_the_engine_is_quiet(tmp_path):
    async with running(tmp_path) as engine, listening(engine, quiet_s=0.05) as listener:
        await engine.subscribed()
        assert await listener.take(1) == [Caught()]
        await engine.say(100)
        assert await listener.take(1) == [(0, 100)]
        await engine.say(101, lost=True)
        await engine.say(102, lost=True)
        assert await listener.take(3) == [Gap(), (1, 101), (2, 102)]
        await engine.say(103)
        assert await listener.take(1) == [(3, 103)]


async def test_what_an_engine_says_does_not_wait_for_a_replay_that_never_comes(tmp_path):
    async with running(tmp_path) as engine, listening(engine, quiet_s=0.02) as listener:
        await engine.subscribed()
        assert await listener.take(1) == [Caught()]
        assert await engine.asked.get() == 0
        engine.mute = True
        await engine.say(100)
        assert await listener.take(1) == [(0, 100)]
        async with asyncio.timeout(3):  # less than it would wait
            assert await engine.asked.get() == 0
            await engine.say(101)
            assert await listener.take(1) == [(1, 101)]


@pytest.mark.parametrize("said", [0, 1, 3, 5])
async def test_an_engine_that_began_anew_is_known_before_it_is_heard(tmp_path, said):
    """Whether it has said nothing yet, less than the old one, as much, or more."""
    times = {"quiet_s": 0.05, "idle_s": 0.05, "replay_timeout_s": 0.2}
    async with running(tmp_path) as engine, listening(engine, **times) as listener:
        await engine.subscribed()
        assert await listener.take(1) == [Caught()]
        for mark in range(3):
            await engine.say(mark)
        assert await listener.take(3) == [(0, 0), (1, 1), (2, 2)]
        await engine.stop()
        async with running(tmp_path) as again:
            for mark in range(said):
                await again.say(50 + mark, lost=True)
            shown: list[object] = []
            while len(shown) < 1 + said:
                shown += [item for item in await listener.take(1) if item != Gap()]
            assert shown == [Restarted(), *((mark, 50 + mark) for mark in range(said))]
        await engine.start()


async def test_a_quiet_engine_that_has_said_all_is_left_in_peace(tmp_path):
    times = {"quiet_s": 0.02, "idle_s": 0.02}
    async with running(tmp_path) as engine, listening(engine, **times) as listener:
        await engine.subscribed()
        assert await listener.take(1) == [Caught()]
        await engine.say(100)
        assert await listener.take(1) == [(0, 100)]
        async with asyncio.timeout(10):
            assert [await engine.asked.get() for _ in range(4)] == [0, 0, 0, 0]
        assert listener.waiting == 0
        assert listener.source.gaps == 0


async def test_an_unreadable_batch_is_a_missed_one(tmp_path):
    async with running(tmp_path) as engine, listening(engine) as listener:
        await engine.subscribed()
        assert await listener.take(1) == [Caught()]
        await engine.say(0)
        await engine.say_raw(b"\xc1")
        await engine.say(2)
        assert await listener.take(3) == [(0, 0), Missed(1, 1), (2, 2)]
        assert listener.source.undecodable == 1


async def test_a_silent_replay_holds_nobody_up(tmp_path):
    async with running(tmp_path) as engine:
        engine.replay = f"ipc://{tmp_path}/nobody"
        async with listening(engine, replay_timeout_s=0.1) as listener:
            await engine.subscribed()
            await engine.say(0)
            assert await listener.take(1) == [(0, 0)]


async def test_only_its_own_topic(tmp_path):
    async with (
        running(tmp_path) as engine,
        listening(engine, replay=False, topic="kw") as listener,
    ):
        await engine.subscribed()
        await engine.say(1)
        engine.topic, engine.seq = b"kw", 0
        await engine.say(2)
        assert await listener.take(1) == [(0, 2)]
