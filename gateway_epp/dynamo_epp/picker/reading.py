"""What is read of a request before anything is chosen: the body, its tokens, what it may take.

Also the way back: the body that the engine gets, where it is not the one that came.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

from dynamo_kv_router.stream.format import WorkerInfo

from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.explain import Entry
from dynamo_epp.requests import (
    BadRequest,
    Kind,
    ParsedRequest,
    parse,
    replace_model,
    strip_kv_transfer_params,
    unparsed,
)
from dynamo_epp.scheduling.ask import Tokens
from dynamo_epp.tokenization import Encoded
from dynamo_epp.tokenize import NotExact

log = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Rule of thumb for prompts that were not tokenized; it only sizes the load booked for them."""
ANSWER_TOKENS = 256
"""Expected of an answer whose length the client does not bound, until the worker tells."""
LONGEST_ANSWER = 131_072
"""Tokens of one answer at most, where no engine has told its limit."""
MOST_ANSWERS = 128
"""Answers to one request (`n`) at most; OpenAI's limit."""
INLINE_BODY = 512 * 1024
"""Bytes; a larger body is parsed beside the loop, where other picks don't wait for it."""
BODILESS = ("/v1/models", "/health", "/ping", "/version")
"""Paths of requests without a body that every worker answers alike, and those below the first."""


@dataclass(slots=True, eq=False)
class Asked:
    """A request while its pick is under way."""

    request_id: str
    path: str  # without the query string
    started: float  # monotonic seconds
    named: str = ""  # the model that the client named; a rewrite may have changed ``parsed``
    waited_s: float = 0.0  # at the gate
    tenant: str = ""
    parsed: ParsedRequest | None = None
    entry: Entry | None = None  # once it was decided

    def stages_ms(self, now: float) -> dict[str, float]:
        """What took its time until ``now``, of a request that nothing was chosen for."""
        stages = {"parse": (now - self.started - self.waited_s) * 1e3}
        return stages | ({"queue": self.waited_s * 1e3} if self.waited_s else {})


class PromptTokens(Protocol):
    """What a picker needs of ``tokenization.Tokenization``."""

    async def encode(self, request: ParsedRequest, workers: list[Worker]) -> Encoded:
        """Raises ``NotExact``."""
        ...

    def on_described(self, worker: Worker, info: WorkerInfo) -> None: ...

    def check(
        self, worker: Worker, model: str, kind: Kind, predicted: int, reported: int
    ) -> None: ...


async def read(path: str, body: bytes | None, *, any_path: bool) -> ParsedRequest:
    """What ``body`` asks for at ``path``, which has no query string.

    Raises ``BadRequest``, unless ``any_path`` says that whatever comes is routed.
    """
    try:
        # HTTP/2 may end a request without a body with an empty chunk of one.
        if not body and (path in BODILESS or path.startswith("/v1/models/")):
            return unparsed(None, "a request without a body")
        if body is None:
            raise BadRequest(404, f"No API at {path} without a body.", code="unknown_path")
        if len(body) <= INLINE_BODY:
            return parse(path, body)
        return await asyncio.to_thread(parse, path, body)
    except BadRequest as error:
        if not any_path:
            raise
        why = error.message if body is not None else "a request without a body"
        return unparsed(body, why)


async def tokens_of(
    tokenization: PromptTokens, parsed: ParsedRequest, workers: list[Worker]
) -> tuple[Tokens | None, int, str]:
    """The prompt's tokens, how many there are (-1: not known), and why there are none to go by.

    Tokens that are not believed are counted all the same, so that belief can return.
    """
    try:
        encoded = await tokenization.encode(parsed, workers)
    except NotExact as error:
        return None, -1, str(error)
    except Exception:  # routing by load is better than no answer
        log.exception("tokenizing failed")
        return None, -1, "tokenizing failed; the picker's log says how"
    tokens = None if encoded.distrust else encoded.tokens
    return tokens, len(encoded.tokens), encoded.distrust


def expected_tokens(request: ParsedRequest, max_model_len: int = 0) -> float:
    """What a request will probably take, prompt and answer, before it was tokenized.

    No answer is taken to be longer than ``max_model_len`` (tokens; 0: not known), nor more than
    ``MOST_ANSWERS`` of them: numbers from clients have any size, and what they are charged for may
    be a limit that they share with others.
    """
    answer = ANSWER_TOKENS if request.max_tokens is None else request.max_tokens
    answer = min(max(0, answer), max_model_len or LONGEST_ANSWER)
    return request.body_bytes / BYTES_PER_TOKEN + min(max(1, request.n), MOST_ANSWERS) * answer


def for_the_engine(parsed: ParsedRequest, named: str, body: bytes) -> bytes | None:
    """The body for the engine, where the client ``named`` the model; ``None``: as it came.

    Call it before anything is booked. Raises ``BadRequest``: the body was read from another stack,
    and may be too deep for this one.
    """
    changed = strip_kv_transfer_params(body) if parsed.has_kv_transfer_params else None
    if parsed.model not in ("", named):
        changed = replace_model(body if changed is None else changed, parsed.model)
    return changed
