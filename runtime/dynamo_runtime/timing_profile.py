"""How long a model takes on a GPU: the timing profile.

The simulated engine lives by it and the planner reckons with it, so its format stands here, where
both can read it. A profile is a small JSON or YAML file of measured points.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

import msgspec


class InvalidProfile(Exception):
    """A profile that can't be used; the message names file, field and expectation."""


class DecodePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One decode step of ``batch`` running sequences takes ``step_s`` seconds."""

    batch: int
    step_s: float


class TimingProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times of one engine.

    A prefill of *n* uncached tokens takes ``prefill_overhead_s + n / prefill_tokens_per_s``
    seconds. A decode step takes the time of its batch size, linear between the points, constant
    below the first and on the last segment's slope beyond the last.
    """

    prefill_tokens_per_s: float = 20_000.0
    prefill_overhead_s: float = 0.004
    decode: tuple[DecodePoint, ...] = (
        DecodePoint(1, 0.010),
        DecodePoint(32, 0.016),
        DecodePoint(128, 0.030),
        DecodePoint(256, 0.050),
    )

    def __post_init__(self) -> None:
        if self.prefill_tokens_per_s <= 0:
            raise ValueError("prefill_tokens_per_s must be greater than 0")
        if self.prefill_overhead_s < 0:
            raise ValueError("prefill_overhead_s must not be negative")
        if not self.decode:
            raise ValueError("decode needs at least one point {batch, step_s}")
        sizes = [point.batch for point in self.decode]
        if sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError("decode points must have batch sizes ≥ 1 that rise")
        if any(point.step_s < 0 for point in self.decode):
            raise ValueError("decode: step_s must not be negative")

    def prefill_seconds(self, tokens: float) -> float:
        """Seconds to prefill ``tokens`` uncached tokens; 0 for none."""
        if tokens <= 0:
            return 0.0
        return self.prefill_overhead_s + tokens / self.prefill_tokens_per_s

    def decode_step_seconds(self, batch: float) -> float:
        """Seconds for one token of each of ``batch`` running sequences; 0 for none."""
        points = self.decode
        if batch <= 0:
            return 0.0
        if batch <= points[0].batch or len(points) == 1:
            return points[0].step_s
        right = min(bisect_right([point.batch for point in points], batch), len(points) - 1)
        low, high = points[right - 1], points[right]
        slope = (high.step_s - low.step_s) / (high.batch - low.batch)
        return max(0.0, low.step_s + slope * (batch - low.batch))


DEFAULT = TimingProfile()


def load(path: Path | str) -> TimingProfile:
    """Read a profile (JSON, or YAML by its suffix). Raises ``InvalidProfile``."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidProfile(f"{path}: {error.strerror}") from error
    try:
        if path.suffix in (".yaml", ".yml"):
            return msgspec.yaml.decode(data, type=TimingProfile)
        return msgspec.json.decode(data, type=TimingProfile)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidProfile(f"{path}: {error}") from error
