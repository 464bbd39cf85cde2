"""One byte form for equal data, and short hashes of it.

Worker hashes name Deployments and decide whether pods are replaced, so they must not depend on
the order in which somebody wrote a map's keys.
"""

import hashlib
from typing import Any

import msgspec

_encoder = msgspec.json.Encoder(order="deterministic")


def canonical(data: Any) -> bytes:
    """JSON of `data` with sorted keys and no blanks: equal data, equal bytes."""
    return _encoder.encode(data)


def short_hash(data: Any) -> str:
    """First 8 hex digits of the SHA-256 of `data`'s canonical bytes."""
    return hashlib.sha256(canonical(data)).hexdigest()[:8]
