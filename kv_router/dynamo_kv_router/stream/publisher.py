"""The worker's end of the stream on a socket.

One XPUB socket per worker serves every picker. In verboser mode it hands out each subscription
and each cancellation, also those of a reconnect or a dead peer, which is what asks for snapshots
and what counts pickers.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import zmq

from dynamo_kv_router.stream.format import UNKNOWN, Finished, Load, WorkerInfo
from dynamo_kv_router.stream.session import HEARTBEAT_S, Frames, PublisherSession

logger = logging.getLogger(__name__)

COALESCE_S = 0.005
"""An event waits this long for others: a short request's acceptance, first token and end are often
one message then, which every picker pays for. A pick stays unconfirmed that much longer."""

LINGER_MS = 500
QUEUE_MESSAGES = 1_000
"""Kept for a subscriber that does not read; it misses what comes after, and resyncs."""
PEER_PING_MS = 1_000
PEER_TIMEOUT_MS = 3_000
MAX_SUBSCRIPTION_BYTES = 512


def new_epoch() -> int:
    """Random, 63 bits."""
    return secrets.randbits(63)


class WorkerPublisher:
    """Publishes one worker's cache and load. All calls belong to the event loop's thread.

    address: where to bind, such as `tcp://0.0.0.0:5557`; port 0 takes a free one (see `endpoint`).
    clock: Unix time, seconds.
    on_pickers: called with the number of live pickers each time it changes.
    """

    def __init__(
        self,
        address: str,
        info: WorkerInfo,
        *,
        clock: Callable[[], float] = time.time,
        epoch: int | None = None,
        on_pickers: Callable[[int], None] | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self._address = address
        self._clock = clock
        self._on_pickers = on_pickers
        self._session = PublisherSession(info, epoch=new_epoch() if epoch is None else epoch)
        self._context = context if context is not None else zmq.Context.instance()
        self._socket: zmq.Socket[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flush_handle: asyncio.Handle | None = None
        self._beat_handle: asyncio.Handle | None = None
        self._pickers = 0
        self.picker_seen = asyncio.Event()
        """Set for good when the first picker has subscribed."""

    @property
    def endpoint(self) -> str:
        """The bound address, with the real port."""
        if self._socket is None:
            raise RuntimeError("publisher is not started")
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    @property
    def picker_count(self) -> int:
        """Live pickers."""
        return self._pickers

    @property
    def session(self) -> PublisherSession:
        """The state that is published; to read."""
        return self._session

    async def start(self) -> None:
        """Bind and begin to answer. Raises OSError that names the address if it can't be bound."""
        loop = asyncio.get_running_loop()
        socket = self._context.socket(zmq.XPUB)
        socket.setsockopt(zmq.XPUB_VERBOSER, 1)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, PEER_PING_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, PEER_TIMEOUT_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION_BYTES)
        try:
            socket.bind(self._address)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise OSError(
                error.errno, f"worker stream: can't bind {self._address}: {error}"
            ) from error
        self._socket = socket
        self._loop = loop
        loop.add_reader(socket.fileno(), self._drain)
        self._beat_handle = loop.call_later(HEARTBEAT_S, self._beat)
        self._drain()
        if self._session.pending:
            self._schedule()

    async def stop(self) -> None:
        """Send what is queued and close. Idempotent."""
        if self._socket is None or self._loop is None:
            return
        self._flush()
        for handle in (self._flush_handle, self._beat_handle):
            if handle is not None:
                handle.cancel()
        self._flush_handle = self._beat_handle = None
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None

    # cache

    def store(self, keys: npt.NDArray[np.uint64] | Sequence[int]) -> None:
        """Blocks entered the cache."""
        self._session.store(keys)
        self._schedule()

    def remove(self, keys: npt.NDArray[np.uint64] | Sequence[int]) -> None:
        """Blocks left the cache."""
        self._session.remove(keys)
        self._schedule()

    def clear(self) -> None:
        """Every block left the cache."""
        self._session.clear()
        self._schedule()

    def restart_epoch(self, epoch: int | None = None) -> None:
        """The engine began anew: no block is cached and no request is in flight."""
        self._session.restart_epoch(new_epoch() if epoch is None else epoch)
        self._schedule()

    # requests

    def accepted(
        self, booking: str, prompt_tokens: int = UNKNOWN, cached_tokens: int = UNKNOWN
    ) -> None:
        self._session.accepted(booking, prompt_tokens, cached_tokens)
        self._schedule()

    def first_token(self, booking: str, prefillers_failed: tuple[str, ...] = ()) -> None:
        self._session.first_token(booking, prefillers_failed)
        self._schedule()

    def finished(
        self,
        booking: str,
        *,
        prompt_tokens: int = UNKNOWN,
        cached_tokens: int = UNKNOWN,
        completion_tokens: int = UNKNOWN,
        status: int = 200,
        prefillers_failed: tuple[str, ...] = (),
    ) -> None:
        self._session.finished(
            Finished(
                booking,
                prompt_tokens,
                cached_tokens,
                completion_tokens,
                status,
                prefillers_failed,
            )
        )
        self._schedule()

    # load and description

    def set_load(self, load: Load, taken_at: float | None = None) -> None:
        """The engine's figures; `pickers`, `draining` and `age_s` are filled in on sending.

        taken_at: when they were true, by the loop's clock; None: now.
        """
        now = asyncio.get_running_loop().time() if taken_at is None else taken_at
        self._session.set_load(load, now)
        self._schedule()

    def set_draining(self) -> None:
        self._session.set_draining()
        self._schedule()

    def set_info(self, info: WorkerInfo) -> None:
        """The description changed; nothing is sent if it did not."""
        self._session.set_info(info)
        self._schedule()

    # socket

    def _schedule(self) -> None:
        if self._loop is None or self._socket is None:
            return  # sent on start
        if self._session.due:
            self._flush()
        elif self._flush_handle is None and self._session.pending:
            self._flush_handle = self._loop.call_later(COALESCE_S, self._flush)

    def _flush(self, *, heartbeat: bool = False) -> None:
        assert self._loop is not None
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        now = self._loop.time()
        frames = self._session.flush(now, self._clock(), heartbeat=heartbeat)
        if frames is not None:
            self._send(frames)
        # libzmq signals its descriptor on edges only, and sending can swallow one.
        self._drain()

    def _beat(self) -> None:
        assert self._loop is not None
        self._beat_handle = self._loop.call_later(HEARTBEAT_S, self._beat)
        self._flush(heartbeat=True)

    def _send(self, frames: Frames) -> None:
        assert self._socket is not None
        # XPUB never blocks: a subscriber whose queue is full misses the message and resyncs.
        self._socket.send_multipart(frames, zmq.NOBLOCK, copy=True)

    def _drain(self) -> None:
        socket, loop = self._socket, self._loop
        if socket is None or loop is None:
            return
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            for answer in self._session.subscription(frames[0], loop.time(), self._clock()):
                self._send(answer)
        self._count_pickers()
        if self._session.pending:
            self._schedule()

    def _count_pickers(self) -> None:
        pickers = self._session.pickers
        if pickers == self._pickers:
            return
        self._pickers = pickers
        if pickers:
            self.picker_seen.set()
        logger.debug("pickers: %d", pickers)
        if self._on_pickers is not None:
            self._on_pickers(pickers)
