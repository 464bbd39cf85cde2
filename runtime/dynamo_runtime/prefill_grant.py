"""Which prefill workers a decode worker may ask for one request: a picker's word, signed.

A decode worker reads another engine's memory at whatever address it is given, and a prefill worker
keeps the cache of any prompt for whoever asks. So the address comes with a signature that only
processes of the same graph can make, bound to one request and to a short time. The other side runs
in the engine's own Python: `dynamo_workers/engine_side/dynamo_engine_prefill.py`.

Two headers, the first one llm-d's:

    x-prefiller-host-port: 10.0.0.7:8000,10.0.0.9:8000            best first
    x-dynamo-prefill-grant: expires=1700000060;enforce=0;local=32;cached=96,0;mac=<hex>

``expires`` is in Unix seconds. ``enforce`` 1 means: no answer rather than one whose prompt the
decode worker computed itself. ``local`` and ``cached`` are the prompt tokens that the decode worker
and each prefill worker are thought to cache. ``mac`` is HMAC-SHA256 (RFC 2104) over the lines of
``signed_text``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PREFILLERS_HEADER = "x-prefiller-host-port"
GRANT_HEADER = "x-dynamo-prefill-grant"
SECRET_VARIABLE = "DYN_PD_SECRET"
SECRET_FILE_VARIABLE = "DYN_PD_SECRET_FILE"
SHORTEST_SECRET = 16  # bytes
PREFILL_BOOKING = ".prefill"
"""What is added to a request's booking key for its part in the prefill worker."""


class BadSecret(ValueError):
    """A secret that can't be used; the message names variable or file, never the content."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What one request's decode worker may do."""

    prefillers: tuple[str, ...]  # ip:port, best first; at least one
    booking: str  # key of the decode worker's booking
    expires: int  # Unix seconds
    enforce: bool
    local_tokens: int  # prompt tokens that the decode worker itself is thought to cache
    cached_tokens: tuple[int, ...]  # the same of each prefiller

    def headers(self, secret: bytes) -> tuple[tuple[str, str], tuple[str, str]]:
        """The two headers, signed."""
        addresses = ",".join(self.prefillers)
        fields = (
            f"expires={self.expires};enforce={int(self.enforce)};local={self.local_tokens};"
            f"cached={','.join(map(str, self.cached_tokens))}"
        )
        text = signed_text(addresses, self.booking, fields)
        mac = hmac.new(secret, text, hashlib.sha256).hexdigest()
        return (PREFILLERS_HEADER, addresses), (GRANT_HEADER, f"{fields};mac={mac}")


def signed_text(addresses: str, booking: str, fields: str) -> bytes:
    """What the signature covers; no part can hold a line break, so none can pass for another."""
    return "\n".join(("dynamo-prefill-grant-1", addresses, booking, fields)).encode()


def read_secret(env: Mapping[str, str]) -> bytes | None:
    """The graph's secret from the environment, or from the file it names; None if neither is set.

    Raises ``BadSecret``.
    """
    source, text = SECRET_VARIABLE, env.get(SECRET_VARIABLE, "").encode()
    if not text:
        path = env.get(SECRET_FILE_VARIABLE, "")
        if not path:
            return None
        source = f"{SECRET_FILE_VARIABLE}={path}"
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise BadSecret(f"{source}: {error.strerror}") from error
    secret = text.strip()
    if len(secret) < SHORTEST_SECRET:
        raise BadSecret(
            f"{source}: {len(secret)} bytes are too short for a secret; give {SHORTEST_SECRET} "
            "or more, such as the output of `openssl rand -hex 32`"
        )
    return secret
