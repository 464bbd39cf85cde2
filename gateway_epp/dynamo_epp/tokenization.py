"""Which tokenizer a request goes through, and whether its tokens may be believed.

Our workers serve their model's files, so the picker tokenizes by itself; stock engines are asked
over HTTP. Either way the engine's own count, where it comes back, is compared with the picker's,
and requests of a kind whose counts differ are routed by load until they agree again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection
from dataclasses import dataclass

import aiohttp
import numpy as np
import numpy.typing as npt
from dynamo_kv_router.stream.format import WorkerInfo

from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.metrics import PickerMetrics
from dynamo_epp.requests import Kind, ParsedRequest, Prompt
from dynamo_epp.tokenize import (
    Exactness,
    LocalTokenizer,
    NotExact,
    PromptTokenizer,
    RemoteTokenizer,
    TokenizerSource,
    TokenizeThreads,
    TooCostly,
    Trust,
    fingerprint,
)

log = logging.getLogger(__name__)

LOAD_WAIT_S = 5.0
"""How long a request waits for its model's tokenizer to be fetched and built."""
RETRY_S = 5.0
"""Pause before a tokenizer that could not be loaded is tried again; it doubles…"""
SECOND_ASKED_S = 0.25
"""An engine that has not given a prompt's tokens by then is not the only one asked any more: one
that works needs milliseconds, and one that hangs must not hold up those that go elsewhere."""
LONGEST_RETRY_S = 300.0
"""…up to this."""


def _settings(info: WorkerInfo) -> dict[str, str]:
    return {"max_model_len": str(info.max_model_len), **info.tokenizer_settings}


@dataclass(slots=True)
class _Failure:
    """A tokenizer that can't be loaded."""

    message: str = ""
    pause_s: float = 0.0
    retry_at: float = 0.0  # the loop's seconds


@dataclass(frozen=True, slots=True)
class Encoded:
    """Prompt tokens. ``distrust`` says why they must not be routed by ("" if they may): they are
    computed all the same, to see whether the engine's counts agree again."""

    tokens: npt.NDArray[np.uint32]
    distrust: str = ""


class Tokenization:
    """The tokenizers of all models of a pool. ``session`` and ``threads`` belong to the caller."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        threads: TokenizeThreads,
        source: TokenizerSource,
        metrics: PickerMetrics,
    ) -> None:
        self._session = session
        self._threads = threads
        self._source = source
        self._metrics = metrics
        # A kind of request whose counts differ says nothing of the others.
        self._trust: dict[tuple[str, Kind], Exactness] = {}  # model, kind -> comparison
        # fingerprint -> the load under way or the last that failed
        self._loads: dict[str, asyncio.Task[LocalTokenizer]] = {}
        self._failures: dict[str, _Failure] = {}  # by fingerprint
        self._infos: dict[Worker, WorkerInfo] = {}  # of workers that serve their model's files
        self._turn = 0

    def differing(self) -> list[str]:
        """Of which requests the tokens differ from the engine's, in sentences."""
        return [
            f"{model}, {kind.value}: {trust.reason}"
            for (model, kind), trust in self._trust.items()
            if trust.state is Trust.MISMATCH
        ]

    def missing(self) -> list[str]:
        """Why tokenizers that workers serve could not be loaded."""
        return [failure.message for failure in self._failures.values()]

    def stop(self) -> None:
        for task in self._loads.values():
            task.cancel()
        self._loads.clear()

    # --- what workers tell

    def on_described(self, worker: Worker, info: WorkerInfo) -> None:
        """Fetch the worker's tokenizer unless it is known."""
        if not info.tokenizer or worker.endpoint.status_port is None:
            worker.tokenizer = ""
            self._infos.pop(worker, None)
            return
        worker.tokenizer = fingerprint(info.tokenizer, _settings(info))
        self._infos[worker] = info
        self._fetch(worker, info)

    def _fetch(self, worker: Worker, info: WorkerInfo) -> None:
        running = self._loads.get(worker.tokenizer)
        if self._source.get(worker.tokenizer) is None and (running is None or running.done()):
            task = asyncio.create_task(self._load(worker, info))
            # Its failure is told by `_load`; perhaps no request ever waits for it.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._loads[worker.tokenizer] = task

    async def _load(self, worker: Worker, info: WorkerInfo) -> LocalTokenizer:
        name = worker.tokenizer
        base = f"http://{worker.endpoint.address}:{worker.endpoint.status_port}"
        try:
            loaded = await self._source.load(base, info.tokenizer, _settings(info))
        except Exception as error:
            failure = self._failures.setdefault(name, _Failure())
            if failure.message != str(error):
                log.warning("no tokenizer for %s from %s: %s", info.model, worker.name, error)
            failure.message = str(error)
            failure.pause_s = min(2 * failure.pause_s or RETRY_S, LONGEST_RETRY_S)
            failure.retry_at = asyncio.get_running_loop().time() + failure.pause_s
            if isinstance(error, NotExact):
                raise
            raise NotExact(f"the model's tokenizer did not load: {error!r}") from error
        self._failures.pop(name, None)
        return loaded

    def check(self, worker: Worker, model: str, kind: Kind, predicted: int, reported: int) -> None:
        """Compare a prompt's token count with the engine's (−1: not reported)."""
        label = self._metrics.label(model)
        if reported < 0:
            self._metrics.tokenization.labels(label, "unreported").inc()
            return
        trust = self._trust_of(model, kind)
        result = "match" if predicted == reported else "mismatch"
        self._metrics.tokenization.labels(label, result).inc()
        if trust.observe(predicted, reported):
            exact = trust.state is Trust.EXACT
            self._metrics.tokenization_exact.labels(label, kind.value).set(exact)
            if exact:
                log.warning("%s, %s: token counts agree with the engine's again", model, kind.value)
            else:
                log.error(
                    "%s, %s: %s (seen on %s); such requests are routed by load",
                    model,
                    kind.value,
                    trust.reason,
                    worker.name,
                )

    def _trust_of(self, model: str, kind: Kind) -> Exactness:
        trust = self._trust.get((model, kind))
        if trust is None:
            trust = self._trust[model, kind] = Exactness()
            self._metrics.tokenization_exact.labels(self._metrics.label(model), kind.value).set(1)
        return trust

    async def loaded(self, timeout_s: float) -> None:
        """Wait for the loads under way, at most ``timeout_s`` seconds. Building a tokenizer holds
        up everything else in the process, so it is best done before requests come."""
        if self._loads:
            await asyncio.wait(self._loads.values(), timeout=timeout_s)

    def keep_up(self, workers: Collection[Worker]) -> None:
        """To be called now and then: drop tokenizers that none of ``workers`` needs any more, and
        try again what could not be loaded, from any worker that has it."""
        needed = {worker.tokenizer for worker in workers}
        self._source.retain(needed)
        for name in [n for n, task in self._loads.items() if task.done() and n not in needed]:
            del self._loads[name]
            self._failures.pop(name, None)
        for worker in self._infos.keys() - set(workers):
            del self._infos[worker]
        now = asyncio.get_running_loop().time()
        sources = list(self._infos.items())
        random.shuffle(sources)  # the one that failed must not always be the first
        for worker, info in sources:
            failure = self._failures.get(worker.tokenizer)
            if worker.live and failure is not None and now >= failure.retry_at:
                self._fetch(worker, info)

    # --- what requests need

    async def encode(self, request: ParsedRequest, workers: list[Worker]) -> Encoded:
        """The prompt's tokens as the engine will have them. Raises ``NotExact``."""
        if request.prompt is None:
            raise NotExact(request.not_tokenizable or "the prompt can't be tokenized here")
        trust = self._trust_of(request.model, request.kind)
        if not trust.predicts():
            raise NotExact(trust.reason)
        tokenized = await self._tokenize(request, workers)
        if len(tokenized) != 1:
            raise NotExact(f"{len(tokenized)} prompts in one request")
        return Encoded(tokenized[0], trust.reason)

    async def _tokenize(
        self, request: ParsedRequest, workers: list[Worker]
    ) -> list[npt.NDArray[np.uint32]]:
        assert request.prompt is not None
        problem = NotExact("no worker serves a tokenizer, and none can be asked")
        for name in dict.fromkeys(worker.tokenizer for worker in workers if worker.tokenizer):
            try:
                return await (await self._local(name)).tokenize(request.prompt)
            except TooCostly:
                raise  # engines have better things to do, too
            except NotExact as error:
                problem = error
        engines = self._engines(request.model, workers)
        if not engines:
            raise problem
        return await _first_to_tell(engines, request.prompt)

    async def _local(self, name: str) -> PromptTokenizer:
        loaded = self._source.get(name)
        if loaded is not None:
            return loaded
        task = self._loads.get(name)
        if task is None:
            raise NotExact("the model's tokenizer is not loaded")
        try:
            return await asyncio.wait_for(asyncio.shield(task), LOAD_WAIT_S)
        except TimeoutError:
            raise NotExact(f"the model's tokenizer did not load within {LOAD_WAIT_S:g} s") from None

    def _engines(self, model: str, workers: list[Worker]) -> list[RemoteTokenizer]:
        """Two engines to ask, others at each call: for stock engines, and for models whose files
        give no exact tokenizer. One that is not heard of is asked only if all are so."""
        ready = [w for w in workers if w.endpoint.ready and not w.endpoint.terminating]
        ready = [w for w in ready if not w.breaker.silence] or ready
        self._turn += 1
        chosen = [ready[(self._turn + n) % len(ready)] for n in range(min(2, len(ready)))]
        return [RemoteTokenizer(self._session, f"http://{w.hostport}", model=model) for w in chosen]


async def _first_to_tell(
    tokenizers: list[RemoteTokenizer], prompt: Prompt
) -> list[npt.NDArray[np.uint32]]:
    """Ask the first; the next once it refused, or was silent for ``SECOND_ASKED_S``.

    Raises what the last one raised if none can tell.
    """
    waiting, asked = list(tokenizers), set[asyncio.Task[list[npt.NDArray[np.uint32]]]]()
    problem: BaseException | None = None
    try:
        while waiting or asked:
            if waiting:
                asked.add(asyncio.create_task(waiting.pop(0).tokenize(prompt)))
            done, asked = await asyncio.wait(
                asked,
                timeout=SECOND_ASKED_S if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                problem = task.exception()
                if problem is None:
                    return task.result()
    finally:
        for task in asked:
            task.cancel()
    assert problem is not None
    raise problem
