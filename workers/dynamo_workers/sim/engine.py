"""Drives the scheduler with a real clock.

One task does what the engine's core does in vLLM: take a step, let its time pass, hand out the
tokens, publish the events. Times are kept as deadlines, not as sleeps, so that a timer that fires
late does not slow the simulated engine down.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from dynamo_workers.sim.events import EventPublisher
from dynamo_workers.sim.metrics import Metrics, RequestTimes
from dynamo_workers.sim.scheduler import Scheduler, Sequence
from dynamo_workers.sim.transfer import Connector

log = logging.getLogger(__name__)

LARGEST_LAG = 0.5
"""Seconds that the simulation may be behind its deadlines before it gives up catching up."""


class Engine:
    """Runs sequences in (accelerated) real time; all methods belong to one event loop.

    `speed` divides every simulated time; with 0, no time passes at all between steps.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        publisher: EventPublisher | None = None,
        connector: Connector | None = None,
        speed: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.metrics = Metrics(scheduler.limits.max_model_len)
        self.connector = connector
        self._publisher = publisher
        self._speed = speed
        self._clock = clock
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._steady_since = -1.0  # when the previous step ended: most tokens' predecessor

    async def start(self) -> None:
        """Raises OSError where an address is taken."""
        if self.connector is not None:
            await self.connector.start()
        if self._publisher is not None:
            self._publisher.start()
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(_raise_failure)

    async def stop(self) -> None:
        """Stops stepping; sequences that still run stay unfinished."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.connector is not None:
            await self.connector.stop()
        if self._publisher is not None:
            self._publisher.close()

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence; ValueError if it is longer than the engine takes."""
        self.scheduler.add(sequence, self._clock())
        self._work.set()

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence that nobody waits for any more, and frees its blocks."""
        self.scheduler.abort(sequence)

    def reset_prefix_cache(self) -> bool:
        """As vLLM: refused while something runs, announced with the next step's events."""
        return self.scheduler.pool.reset()

    async def _run(self) -> None:
        scheduler, clock = self.scheduler, self._clock
        deadline = clock()
        while True:
            now = clock()
            step = scheduler.schedule(now)
            if step is None:
                self._work.clear()
                await self._work.wait()
                deadline = clock()
                continue
            if self._speed:
                deadline = max(deadline, now - LARGEST_LAG) + step.seconds / self._speed
                await asyncio.sleep(max(0.0, deadline - now))
            else:
                await asyncio.sleep(0)
            now = clock()
            progressed = scheduler.complete(step, now)
            self._account(step.prefill_tokens + step.decoding, progressed, now)
            events = scheduler.pool.take_events()
            if events and self._publisher is not None:
                self._publisher.publish(events, time.time())
            for sequence in progressed:
                if sequence.finished and sequence.keep_as and self.connector is not None:
                    sequence.transfer_params = self.connector.hold(sequence)
                if sequence.on_progress is not None:
                    sequence.on_progress()

    def _account(self, computed: int, progressed: list[Sequence], now: float) -> None:
        metrics = self.metrics
        metrics.step_tokens.observe(computed)
        steady = 0
        for sequence in progressed:
            if sequence.produced > 1:
                if sequence.previous_token_at == self._steady_since:
                    steady += 1
                else:
                    metrics.inter_token.observe(now - sequence.previous_token_at)
            else:
                metrics.record_first_token(
                    len(sequence.prompt),
                    sequence.cached_tokens,
                    sequence.external_tokens,
                    now - sequence.arrived_at,
                )
            if sequence.finished:
                self._record_finished(sequence, now)
        metrics.generation_tokens += sum(1 for sequence in progressed if sequence.answer)
        if steady:
            metrics.inter_token.observe(now - self._steady_since, steady)
        self._steady_since = now

    def _record_finished(self, sequence: Sequence, now: float) -> None:
        first = sequence.first_token_at or now
        self.metrics.record_finished(
            RequestTimes(
                reason=sequence.finish_reason,
                prompt_tokens=len(sequence.prompt),
                answer_tokens=sequence.produced,
                cached_tokens=sequence.cached_tokens,
                max_tokens=sequence.max_tokens,
                preemptions=sequence.preemptions,
                queue_s=sequence.admitted_at - sequence.arrived_at,
                prefill_s=first - sequence.admitted_at,
                decode_s=now - first,
                total_s=now - sequence.arrived_at,
            )
        )


def _raise_failure(task: asyncio.Task[None]) -> None:
    """A dead engine must not look alive: as vLLM, the process ends when its core dies."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the engine died", exc_info=error)
        raise SystemExit(1)
