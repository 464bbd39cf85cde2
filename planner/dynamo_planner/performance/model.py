"""The seam, and the two models that need no traffic: a measured profile, and the roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dynamo_runtime.timing_profile import TimingProfile

from dynamo_planner.config.model import Roofline


class Model(Protocol):
    """Times of one engine. Both rise, weakly, with each argument."""

    @property
    def name(self) -> str:
        """profile, live or roofline."""
        ...

    def prefill_s(self, tokens: float) -> float:
        """Seconds to compute a prompt of ``tokens`` that no cache holds."""
        ...

    def step_s(self, batch: float, context: float) -> float:
        """Seconds for one token of each of ``batch`` sequences of ``context`` tokens."""
        ...


@dataclass(frozen=True, slots=True)
class ProfileModel:
    """A timing profile: the file that the simulated engine lives by."""

    profile: TimingProfile
    name: str = "profile"

    def prefill_s(self, tokens: float) -> float:
        return self.profile.prefill_seconds(tokens)

    def step_s(self, batch: float, context: float) -> float:
        """The profile knows no context."""
        return self.profile.decode_step_seconds(batch)


@dataclass(frozen=True, slots=True)
class RooflineModel:
    """What compute and memory allow (Williams et al., 2009): a prefill is bound by one, a decode
    step by the other, and neither is faster than reading the weights once."""

    data: Roofline
    name: str = "roofline"

    @property
    def _bandwidth(self) -> float:
        return self.data.bandwidth_gb_s * 1e9 * self.data.memory_efficiency

    def prefill_s(self, tokens: float) -> float:
        """``2 × parameters × tokens`` operations."""
        if tokens <= 0:
            return 0.0
        operations = 2e9 * self.data.parameters * tokens
        compute = operations / (self.data.tflops * 1e12 * self.data.compute_efficiency)
        return max(compute, self.data.weight_bytes * 1e9 / self._bandwidth)

    def step_s(self, batch: float, context: float) -> float:
        """Weights and all sequences' caches read once."""
        if batch <= 0:
            return 0.0
        cache = batch * max(0.0, context) * self.data.kv_bytes_per_token
        return (self.data.weight_bytes * 1e9 + cache) / self._bandwidth
