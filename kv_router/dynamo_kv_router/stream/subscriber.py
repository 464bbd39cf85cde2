"""The picker's end of the stream on a socket: one SUB socket per worker.

The socket is read directly, many messages per wake-up, since a picker reads the streams of all
workers and pays for each message.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterable
from typing import Protocol

import zmq

from dynamo_kv_router.stream.format import Event, Role, Snapshot
from dynamo_kv_router.stream.session import (
    STALE_S,
    Action,
    Apply,
    Doubt,
    Lost,
    Replace,
    Subscribe,
    SubscriberSession,
    Unsubscribe,
)

logger = logging.getLogger(__name__)

TICK_S = 0.25
MESSAGES_PER_WAKE = 200
QUEUE_MESSAGES = 1_000
"""Kept until the loop reads them; then the worker keeps as many, then messages are missed."""
PEER_PING_MS = 1_000
PEER_TIMEOUT_MS = 3_000
RECONNECT_MS = 100
RECONNECT_MAX_MS = 1_000
CONNECT_TIMEOUT_MS = 3_000


class StreamListener(Protocol):
    """Whom a subscriber tells. Called on the event loop; must not block or raise."""

    def on_snapshot(self, worker: str, snapshot: Snapshot) -> None:
        """Forget what was known of the worker; this is its whole state."""

    def on_events(self, worker: str, events: list[Event]) -> None:
        """These happened, in order, since the last call for this worker."""

    def on_doubt(self, worker: str, reason: str) -> None:
        """Something is missing in what is known of the worker, until its next snapshot."""

    def on_lost(self, worker: str, reason: str) -> None:
        """Forget what was known of the worker, if anything, until its next snapshot."""


class WorkerSubscriber:
    """Follows one worker's stream: reconnects, resyncs, notices silence and restarts.

    worker: the pod name it must have; "" accepts any.
    address: such as `tcp://10.0.0.7:5557`; nothing needs to listen there yet.
    subscriber: one id per subscribing process, so that a worker counts it once.
    """

    def __init__(
        self,
        worker: str,
        address: str,
        listener: StreamListener,
        *,
        subscriber: str | None = None,
        role: Role = "picker",
        stale_s: float = STALE_S,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self._worker = worker
        self._address = address
        self._listener = listener
        self._session = SubscriberSession(
            worker, subscriber=subscriber or uuid.uuid4().hex, role=role, stale_s=stale_s
        )
        self._context = context if context is not None else zmq.Context.instance()
        self._socket: zmq.Socket[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tick_handle: asyncio.Handle | None = None
        self._more_handle: asyncio.Handle | None = None
        self._told = ""  # the reason of the last loss in the log

    @property
    def session(self) -> SubscriberSession:
        """State and counters of the protocol; to read."""
        return self._session

    async def start(self) -> None:
        """Connect (in the background) and subscribe. Raises ValueError for a bad address."""
        loop = asyncio.get_running_loop()
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, PEER_PING_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, PEER_TIMEOUT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        try:
            socket.connect(self._address)
        except zmq.ZMQError as error:
            socket.close()
            raise ValueError(f"worker stream address {self._address!r}: {error}") from error
        self._socket = socket
        self._loop = loop
        self._perform(self._session.start(loop.time()))
        loop.add_reader(socket.fileno(), self._drain)
        self._tick_handle = loop.call_later(TICK_S, self._tick)
        self._drain()

    async def stop(self) -> None:
        """Unsubscribe and close; the listener is not called any more. Idempotent."""
        if self._socket is None or self._loop is None:
            return
        for handle in (self._tick_handle, self._more_handle):
            if handle is not None:
                handle.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None

    def _tick(self) -> None:
        assert self._loop is not None
        self._tick_handle = self._loop.call_later(TICK_S, self._tick)
        # What came while this process was held up counts as heard.
        self._drain()
        self._perform(self._session.tick(self._loop.time()))
        self._drain()

    def _drain(self) -> None:
        socket, loop = self._socket, self._loop
        if socket is None or loop is None:
            return
        if self._more_handle is not None:
            self._more_handle.cancel()
            self._more_handle = None
        feed = self._session.feed
        now = loop.time()
        for _ in range(MESSAGES_PER_WAKE):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 2:
                self._perform(feed(frames[0], frames[1], now))
                if self._socket is None:
                    return  # stopped by the listener
        # libzmq signals its descriptor on edges only: come back for the rest.
        self._more_handle = loop.call_soon(self._drain)

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if self._socket is None:
                return
            match action:
                case Apply(events):
                    self._listener.on_events(self._worker, events)
                case Replace(snapshot):
                    self._told = ""
                    logger.info(
                        "worker %s: snapshot of %d blocks, %d requests",
                        self._worker,
                        len(snapshot.keys) // 8,
                        len(snapshot.bookings),
                    )
                    self._listener.on_snapshot(self._worker, snapshot)
                case Doubt(reason):
                    logger.info("worker %s: %s; asking for a snapshot", self._worker, reason)
                    self._listener.on_doubt(self._worker, reason)
                case Lost(reason):
                    if reason != self._told:  # what can't be understood comes again and again
                        logger.warning("worker %s: stream lost: %s", self._worker, reason)
                    self._told = reason
                    self._listener.on_lost(self._worker, reason)
                case Subscribe(topic):
                    self._socket.setsockopt(zmq.SUBSCRIBE, topic)
                case Unsubscribe(topic):
                    self._socket.setsockopt(zmq.UNSUBSCRIBE, topic)
