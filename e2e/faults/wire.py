"""What engines publish, on its way to pickers: a proxy that loses some of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import zmq
import zmq.asyncio


class LossyWire:
    """Passes messages from ``source`` to whoever subscribes at ``address`` (both ZeroMQ addresses).

    ``loss`` is the share of messages that get lost, drawn from ``rng``; it may be set at any time.
    Subscriptions always pass.
    """

    def __init__(self, source: str, address: str, rng: random.Random) -> None:
        self.loss = 0.0
        self.passed = self.lost = 0
        self.blind: list[tuple[float, float]] = []
        """Monotonic times of a lost message and of the next that passed. In between nobody can know
        that something is missing."""
        self._lost_at: float | None = None  # the first that was lost since one has passed
        self._source, self._address, self._rng = source, address, rng
        self._tasks: list[asyncio.Task[None]] = []

    def is_blind(self, since: float, until: float) -> bool:
        """Whether something was missing unnoticed at some time between the two."""
        spans = self.blind
        if self._lost_at is not None:
            spans = [*spans, (self._lost_at, time.monotonic())]
        return any(lost <= until and known >= since for lost, known in spans)

    async def __aenter__(self) -> LossyWire:
        context = zmq.asyncio.Context.instance()
        self._front = context.socket(zmq.XPUB)
        self._back = context.socket(zmq.XSUB)
        for socket in (self._front, self._back):
            socket.setsockopt(zmq.LINGER, 0)
        self._front.setsockopt(zmq.XPUB_VERBOSER, 1)
        self._back.setsockopt(zmq.RECONNECT_IVL, 50)
        self._front.bind(self._address)
        self._back.connect(self._source)
        self._tasks = [asyncio.create_task(self._subscriptions())]
        self._tasks.append(asyncio.create_task(self._messages()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._front.close()
        self._back.close()

    async def _subscriptions(self) -> None:
        while True:
            await self._back.send(await self._front.recv())

    async def _messages(self) -> None:
        while True:
            frames = await self._back.recv_multipart()
            now = time.monotonic()
            if self._rng.random() < self.loss:
                self.lost += 1
                self._lost_at = now if self._lost_at is None else self._lost_at
                continue
            await self._front.send_multipart(frames)
            self.passed += 1
            if self._lost_at is not None:
                self.blind.append((self._lost_at, now))
                self._lost_at = None
