"""Which worker a session belongs to, for the session-affinity filter and scorer.

Two ways to know, with llm-d's names: ``encoded_endpoint_header``, where the client sends back a
token that names a pod, and ``session_id``, where the client names its session in a header and the
picker remembers the worker. Neither is trusted further than a preference among the candidates.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Literal

from dynamo_crds.schema import Number, Text
from dynamo_kv_router.choice import Candidate, Decision
from pydantic import Field

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters

MOST_SESSIONS = 100_000
"""Sessions that are remembered; of more, those that were idle the longest are forgotten."""

LONGEST_NAME = 128
"""Characters of a session's name; of a longer one, which clients can send, the hash is kept."""


class EncodedEndpointHeader(Parameters):
    header: Text = "x-session-token"
    """Holds the pod's ``namespace/name`` or ``name`` in base64."""


class SessionIdSource(Parameters):
    elsewhere = {  # noqa: RUF012
        "attribute": "header: attributes of other plugins do not exist here",
        "producer": "header: attributes of other plugins do not exist here",
    }
    header: Text
    """The header that names the session."""


class SessionId(Parameters):
    sources: list[SessionIdSource] = Field(
        default_factory=lambda: [SessionIdSource(header="x-session-id")]
    )
    """The first that is there and not empty counts."""
    eviction_ttl_seconds: Annotated[Number, Field(gt=0)] = 300.0
    """A session that is idle for longer is forgotten."""
    eviction_sweep_seconds: Annotated[Number, Field(gt=0)] = 10.0
    """Accepted; what is too old is never used, and goes when newer sessions come."""


class SessionParameters(Parameters):
    strategy: Literal["encoded_endpoint_header", "session_id"] = "encoded_endpoint_header"
    """How a request's session is known."""
    encoded_endpoint_header_config: EncodedEndpointHeader = EncodedEndpointHeader()
    session_id_config: SessionId = SessionId()
    profile_name: str = ""
    """Accepted; a session belongs to the worker that answers."""


class Sessions:
    """Finds a request's worker. Remembers through ``picked``."""

    def __init__(self, parameters: SessionParameters) -> None:
        self._by_token = parameters.strategy == "encoded_endpoint_header"
        self._token_header = parameters.encoded_endpoint_header_config.header.strip().lower()
        config = parameters.session_id_config
        self._id_headers = [source.header.strip().lower() for source in config.sources]
        self._ttl = config.eviction_ttl_seconds
        # (profile, session) -> (name of its worker, when it was last used), the longest idle first.
        self._bound: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    def place(self, ask: Ask, candidates: Sequence[Candidate]) -> int | None:
        """Index of the candidate that the session belongs to; None if there is none among them."""
        name = _pod_of(ask.headers.get(self._token_header, ""))
        if not self._by_token:
            name, used = self._bound.get((ask.profile, self._session(ask)), ("", 0.0))
            if ask.now - used > self._ttl:
                return None
        if not name:
            return None
        return next((at for at, each in enumerate(candidates) if each.name == name), None)

    def picked(self, ask: Ask, decision: Decision) -> None:
        """A new session gets the worker that was picked; so does one whose worker is gone."""
        session = "" if self._by_token else self._session(ask)
        if not session or decision.chosen is None:
            return
        key = decision.profile, session
        name, used = self._bound.pop(key, ("", 0.0))
        here = (scored.candidate.name for scored in decision.ranked)
        if ask.now - used > self._ttl or name not in here:
            name = decision.chosen.candidate.name
        self._bound[key] = (name, ask.now)
        while len(self._bound) > MOST_SESSIONS:
            self._bound.popitem(last=False)

    def answer_headers(self, decision: Decision) -> tuple[tuple[str, str], ...]:
        """The token that brings the session's next request to the same worker."""
        if not self._by_token or decision.chosen is None:
            return ()
        return ((self._token_header, token_of(decision.chosen.candidate.name)),)

    def _session(self, ask: Ask) -> str:
        name = next((value for h in self._id_headers if (value := ask.headers.get(h))), "")
        if len(name) <= LONGEST_NAME:
            return name
        return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()


def token_of(name: str) -> str:
    """The token that ``encoded_endpoint_header`` understands as the pod ``name``."""
    return base64.b64encode(name.encode()).decode()


def _pod_of(token: str) -> str:
    try:
        return base64.b64decode(token, validate=True).decode().rpartition("/")[2]
    except (binascii.Error, ValueError):
        return ""
