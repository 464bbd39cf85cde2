"""A port to which engines bring their KV events, instead of being asked for them.

vLLM's publisher connects where its endpoint has no ``*``: llm-d's central mode, in which pods have
``--kv-events-config {"endpoint": "tcp://EPP:5557", "topic": "kv@POD_IP@MODEL"}``. The topic tells
who speaks: ``kv@<ip>[:port]@<model>``, or the pod's name (llm-d's ``pkg/kvevents``). What a sender
says counts for the endpoint of that address alone, and for nobody if it is none of the pool's.

A connection made this way is one-way: what was said before it was made can be had back only from an
engine that has a ``replay_endpoint`` as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio
from prometheus_client import CollectorRegistry, Counter

from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker

log = logging.getLogger(__name__)

TOPIC = "kv@"
UNREAD_BYTES = 16 * 1024 * 1024
"""Of one engine, at most: more is thrown away, and told by the numbers of the messages."""
MESSAGE_BYTES = 64 * 1024 * 1024
"""A larger message ends its connection: vLLM's batches are far smaller."""
HIGH_WATER_MARK = 100_000  # messages of one connection; vLLM's own default
TELL_EVERY_S = 60.0
OUTCOMES = ("taken", "unknown-sender", "malformed", "overflow")


def outcomes(registry: CollectorRegistry) -> Counter:
    """Messages that came, by what became of them."""
    counter = Counter(
        "dynamo_epp_kv_event_messages",
        "KV event messages that engines sent to --kv-events-bind: taken; of senders that are no "
        "endpoint; malformed; or thrown away because too many were unread.",
        ("outcome",),
        registry=registry,
    )
    for outcome in OUTCOMES:
        counter.labels(outcome)
    return counter


def sender(topic: bytes) -> str:
    """Who speaks, by a topic ``kv@<sender>@<model>``; "" if it says nothing of that. Names of
    models may contain an @."""
    parts = topic.split(b"@", 2)
    if len(parts) != 3:
        return ""
    return parts[1].decode(errors="replace")


class Unread:
    """Messages of one engine that nobody has read yet; read like a ZeroMQ socket."""

    def __init__(self) -> None:
        self._messages: deque[list[bytes]] = deque()
        self._bytes = 0
        self._some = asyncio.Event()
        self.began = False
        """One has come."""

    def put(self, frames: list[bytes]) -> int:
        """Returns how many were thrown away for it."""
        dropped, size = 0, sum(map(len, frames))
        if self._bytes + size > UNREAD_BYTES:
            dropped, self._bytes = len(self._messages), 0
            self._messages.clear()
        self.began = True
        self._messages.append(frames)
        self._bytes += size
        self._some.set()
        return dropped

    async def poll(self, timeout: float | None = None) -> bool:
        """Wait so many milliseconds for a message; false if none came."""
        try:
            async with asyncio.timeout(None if timeout is None else timeout / 1e3):
                return await self._some.wait()
        except TimeoutError:
            return False

    async def recv_multipart(self) -> Sequence[bytes]:
        await self._some.wait()
        frames = self._messages.popleft()
        self._bytes -= sum(map(len, frames))
        if not self._messages:
            self._some.clear()
        return frames

    def close(self) -> None:
        """What is unread stays, for whoever reads next."""


class EventInbox:
    """A bound SUB socket for all engines of a pool.

    ``endpoint`` is a ZeroMQ address to bind, ``topic`` the beginning of the topics that are heard.
    """

    def __init__(
        self,
        endpoint: str,
        topic: str,
        pool: Pool,
        counter: Counter,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._topic = topic
        self._pool = pool
        self._counter = counter
        self._clock = clock
        self._unread: dict[Worker, Unread] = {}  # workers of the pool only
        self._known: dict[bytes, Worker] = {}  # topic -> sender, those of ``_unread`` only
        self._told_at = float("-inf")
        self._socket: zmq.asyncio.Socket | None = None
        self._receiving: asyncio.Task[None] | None = None
        self.address = ""
        """Where it is bound, with the port that was free if 0 was asked for."""

    def start(self) -> None:
        """Raises OSError if the address can't be bound."""
        socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.IPV6, "[" in self._endpoint)
        socket.setsockopt(zmq.SUBSCRIBE, self._topic.encode())
        try:
            socket.bind(self._endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise OSError(f"KV events can't be received on {self._endpoint}: {error}") from error
        self._socket = socket
        self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._receiving = asyncio.create_task(self._receive(socket))
        log.info("engines may bring their KV events to %s", self.address)

    async def stop(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()

    def heard(self, worker: Worker) -> bool:
        """Whether a message of the worker has come."""
        return worker in self._unread and self._unread[worker].began

    def unread(self, worker: Worker) -> Unread:
        """The worker's messages, those included that came before anybody asked for them."""
        if worker not in self._unread:
            members = set(self._pool.workers.values())
            self._unread = {w: unread for w, unread in self._unread.items() if w in members}
            self._known = {topic: w for topic, w in self._known.items() if w in members}
            self._unread[worker] = Unread()
        return self._unread[worker]

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._take(await socket.recv_multipart())

    def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8 or not sender(frames[0]):
            self._counter.labels("malformed").inc()
            self._tell("a message that is none of an engine's, topic %r", frames[0][:100])
            return
        worker = self._sender(frames[0])
        if worker is None:
            self._counter.labels("unknown-sender").inc()
            self._tell("a message of %r, which is no endpoint here", sender(frames[0])[:100])
            return
        self._counter.labels("taken").inc()
        dropped = self.unread(worker).put(frames)
        if dropped:
            self._counter.labels("overflow").inc(dropped)

    def _sender(self, topic: bytes) -> Worker | None:
        known = self._known.get(topic)
        if known is not None and self._pool.workers.get(known.name) is known:
            return known
        name = sender(topic)
        found = [
            worker
            for worker in self._pool.workers.values()
            if worker.stock and name in (worker.endpoint.address, worker.hostport, worker.name)
        ]
        if len(found) != 1:  # an address alone says nothing where a pod has several endpoints
            return None
        self.unread(found[0])
        self._known[topic] = found[0]
        return found[0]

    def _tell(self, what: str, *values: object) -> None:
        """In the log, but not each time."""
        if self._clock() - self._told_at >= TELL_EVERY_S:
            self._told_at = self._clock()
            log.warning("KV events: " + what, *values)
