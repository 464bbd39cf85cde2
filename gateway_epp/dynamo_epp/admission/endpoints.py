"""The pool as the gate sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.scheduling.disagg import PREFILL
from dynamo_epp.scheduling.filters import reason_to_drop


class PoolEndpoints:
    """Implements ``gate.Endpoints`` with a ``Pool``. ``refresh`` brings the workers' circuits up to
    date."""

    def __init__(self, pool: Pool, refresh: Callable[[], None] = lambda: None) -> None:
        self._pool = pool
        self._refresh = refresh

    def eligible(self, model: str) -> Iterator[Worker]:
        """Those that can answer: prefill workers alone are no room for a request."""
        self._refresh()
        return (
            worker
            for worker in self._pool.workers.values()
            if worker.endpoint.role != PREFILL and not reason_to_drop(worker, model)
        )

    def models(self) -> Mapping[str, str]:
        workers = self._pool.workers.values()
        return {name: worker.model for worker in workers for name in worker.models}

    def pickers(self) -> int:
        return max((worker.load.pickers for worker in self._pool.workers.values()), default=1)
