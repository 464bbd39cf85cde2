"""Reasons for which a worker can't be chosen.

A filter gives "" or the reason in words; the first reason found is kept on the candidate, so that
`dynamo explain` can tell it. To add one, write the function and put it into ``FILTERS`` where its
reason should win over those below.
"""

from __future__ import annotations

from collections.abc import Callable

from dynamo_epp.endpoints.worker import Worker

Filter = Callable[[Worker, str], str]


def serves_model(worker: Worker, model: str) -> str:
    if model in worker.models:
        return ""
    return "serves no model yet" if not worker.models else f"does not serve {model}"


def takes_requests(worker: Worker, _: str) -> str:
    """Prefill workers get their requests from decode workers, not from clients."""
    return "prefill role" if worker.endpoint.role == "prefill" else ""


def not_terminating(worker: Worker, _: str) -> str:
    return "terminating" if worker.endpoint.terminating else ""


def not_draining(worker: Worker, _: str) -> str:
    return "draining" if worker.load.draining else ""


def is_ready(worker: Worker, _: str) -> str:
    return "" if worker.endpoint.ready else "not ready"


FILTERS: tuple[Filter, ...] = (
    serves_model,
    takes_requests,
    not_terminating,
    not_draining,
    is_ready,
)


def reason_to_drop(worker: Worker, model: str) -> str:
    """The first reason for which ``worker`` can't serve ``model`` at this moment, or ""."""
    for rule in FILTERS:
        if reason := rule(worker, model):
            return reason
    return ""
