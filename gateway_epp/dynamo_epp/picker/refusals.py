"""The answers given where no pick is possible, in the words of OpenAI's API.

429 says that there is capacity and others use it, 503 that there is none; both say when to come
again. `x-llm-d-request-dropped-reason` carries the reason in one word, llm-d's where it has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from dynamo_kv_router.choice import Decision

from dynamo_epp.admission.gate import NO_ENDPOINT_RETRY_S, Rejection
from dynamo_epp.extproc import Refusal
from dynamo_epp.requests import BadRequest, error_body
from dynamo_epp.scheduling.disagg import Pairing, Why
from dynamo_epp.scheduling.filters.subset import OUTSIDE

REASON_HEADER = "x-llm-d-request-dropped-reason"
CONTENDED_RETRY_S = 1
"""`Retry-After` of a 429 that says nothing better."""
RETRY_S = {429: CONTENDED_RETRY_S, 503: NO_ENDPOINT_RETRY_S}

LEFT = Refusal(
    499,
    error_body(499, "The client left before there was a pick."),
    ((REASON_HEADER, "rejected-context-cancelled"),),
)
"""What is told of a client that did not wait; nobody gets it as an answer."""


def refusal(
    status: int,
    message: str,
    reason: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after_s: int | None = None,
) -> Refusal:
    """A JSON answer with ``status``; ``reason`` is the one word for metrics and headers."""
    if retry_after_s is None:
        retry_after_s = RETRY_S.get(status)
    retry = () if retry_after_s is None else (("retry-after", str(retry_after_s)),)
    return Refusal(
        status,
        error_body(status, message, param=param, code=code),
        (("content-type", "application/json"), (REASON_HEADER, reason), *retry),
    )


def bad_request(error: BadRequest) -> Refusal:
    """The client's mistake."""
    return refusal(error.status, error.message, "bad-request", param=error.param, code=error.code)


def unserved(model: str, served: Iterable[str], undescribed: int) -> Refusal:
    """No worker is known to have ``model``; they have ``served``, and ``undescribed`` workers have
    not told yet: only when all have does nobody serve it."""
    names = sorted(served)
    if not names:
        return refusal(
            503, "No worker has come up yet.", "rejected-no-endpoints", code="no_workers"
        )
    if undescribed:
        silent = "1 worker has not told what it serves"
        if undescribed > 1:
            silent = f"{undescribed} workers have not told what they serve"
        return refusal(
            503,
            f"No worker serves the model {model!r} yet; {silent}.",
            "rejected-no-endpoints",
            code="no_worker_available",
        )
    return refusal(
        404,
        f"The model {model!r} does not exist. Served: {', '.join(names)}.",
        "unknown-model",
        param="model",
        code="model_not_found",
    )


def unroutable(model: str, decision: Decision) -> Refusal:
    """None of the candidates may be chosen. 429: there is capacity, but a filter keeps it back;
    503: there is none."""
    if decision.filtered:
        return refusal(
            429,
            f"All workers for {model} are kept back at the moment; try again later.",
            "rejected-saturated",
            code="workers_saturated",
        )
    message = f"No worker for {model} can take requests at the moment."
    if any(candidate.dropped == OUTSIDE for candidate in decision.dropped):
        message = f"No worker for {model} that the gateway allows can take requests."
    return refusal(503, message, "rejected-no-endpoints", code="no_worker_available")


def unsplit(model: str, pairing: Pairing) -> Refusal:
    """Prefill and decode must be apart, and can't be."""
    reason = "no prefill worker can take requests at the moment"
    if pairing.why is Why.NO_SECRET:
        reason = "the picker has no secret to name prefill workers with"
    return refusal(
        503,
        f"No prefill for {model}: {reason}, and this deployment allows no other way.",
        "rejected-no-prefill-endpoints",
        code="no_prefill_worker_available",
    )


def rejected(rejection: Rejection) -> Refusal:
    """The gate did not let it through."""
    return refusal(
        rejection.status,
        rejection.message,
        rejection.reason,
        code=rejection.reason.replace("-", "_"),
        retry_after_s=rejection.retry_after_s,
    )


def reason_of(answer: Refusal) -> str:
    """The one word."""
    return dict(answer.headers).get(REASON_HEADER, "refused")


def message_of(answer: Refusal) -> str:
    """What the error body tells the client."""
    body: dict[str, dict[str, Any]] = msgspec.json.decode(answer.body)
    return str(body["error"]["message"])
