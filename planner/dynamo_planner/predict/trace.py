"""A warm start: past intervals out of a request trace.

Mooncake's format, one JSON object a line: ``timestamp`` (milliseconds), ``input_length`` and
``output_length`` (tokens); other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from dynamo_planner.predict.history import MOST, Sample


class InvalidTrace(ValueError):
    """A trace that can't be read; the message names line and field."""


class _Request(msgspec.Struct):
    timestamp: float
    input_length: float
    output_length: float


def warmup(lines: Iterable[str], interval_s: float, name: str = "trace") -> tuple[Sample, ...]:
    """The intervals of ``lines``, oldest first, the last and incomplete one left out.

    Intervals in which nothing arrived are there, with a rate of zero. Raises ``InvalidTrace``.
    """
    counts: dict[int, list[float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = msgspec.json.decode(line, type=_Request)
        except msgspec.DecodeError as error:
            raise InvalidTrace(f"{name}, line {number}: {error}") from error
        if request.timestamp < 0 or request.input_length < 0 or request.output_length < 0:
            raise InvalidTrace(f"{name}, line {number}: a negative time or length")
        sums = counts.setdefault(int(request.timestamp / 1000 // interval_s), [0.0, 0.0, 0.0])
        sums[0] += 1
        sums[1] += request.input_length
        sums[2] += request.output_length
    if not counts:
        return ()
    last = max(counts)
    samples = []
    for index in range(max(min(counts), last - MOST), last):
        n, isl, osl = counts.get(index, (0.0, 0.0, 0.0))
        if n:
            samples.append(Sample(n / interval_s, isl / n, osl / n, isl / n))
        else:
            samples.append(Sample(0.0))
    return tuple(samples)
