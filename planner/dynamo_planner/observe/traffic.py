"""What workers did in a stretch of time, and how much of their time was seen.

Averages are made of sums, so that stretches add up and nothing is ever divided by zero: no request
is a rate of zero, and no average at all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Traffic:
    """Sums over workers. Adding two gives that of both stretches."""

    seconds: float = 0.0  # how long the stretch is
    worker_seconds: float = 0.0  # of it, workers' time that readings cover
    ready_seconds: float = 0.0  # workers' time that there was
    arrived: float = 0.0  # requests: those that got a first token, and what the queue grew by
    first_tokens: float = 0.0
    ttft_seconds: float = 0.0
    itl_seconds: float = 0.0
    itl_tokens: float = 0.0
    finished: float = 0.0
    finished_seconds: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    prefill_tokens: float = 0.0
    prefill_seconds: float = 0.0
    running_seconds: float = 0.0  # requests in the batch × time, by worker

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Traffic)))

    @property
    def coverage(self) -> float:
        """Share of the workers' time that was seen, 0..1; 1 where there was none to see."""
        if self.ready_seconds <= 0:
            return 1.0
        return min(1.0, self.worker_seconds / self.ready_seconds)

    def rate(self, least_coverage: float) -> float | None:
        """Requests a second of all workers; None if too little was seen.

        Workers that were not seen are taken to have done as the others did. Where there were no
        workers there were no requests that anybody could count: 0.
        """
        if self.seconds <= 0 or self.coverage < least_coverage:
            return None
        if self.worker_seconds <= 0:
            return 0.0
        each = max(0.0, self.arrived) / self.worker_seconds
        return each * self.ready_seconds / self.seconds

    def mean(self, total: str, count: str) -> float | None:
        """One sum by another; None without any."""
        n = float(getattr(self, count))
        return float(getattr(self, total)) / n if n > 0 else None

    @property
    def ttft_s(self) -> float | None:
        return self.mean("ttft_seconds", "first_tokens")

    @property
    def itl_s(self) -> float | None:
        return self.mean("itl_seconds", "itl_tokens")

    @property
    def request_s(self) -> float | None:
        return self.mean("finished_seconds", "finished")

    @property
    def isl(self) -> float | None:
        """Mean prompt of a request, tokens."""
        return self.mean("prompt_tokens", "finished")

    @property
    def osl(self) -> float | None:
        """Mean answer of a request, tokens."""
        return self.mean("output_tokens", "finished")

    @property
    def computed(self) -> float | None:
        """Mean prompt tokens computed for a request: without those found in a cache."""
        return self.mean("prefill_tokens", "finished")

    @property
    def batch(self) -> float | None:
        """Mean requests in a worker's batch."""
        return self.mean("running_seconds", "worker_seconds")
