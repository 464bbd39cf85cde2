"""Reasons for which a worker can't serve a request, whatever the configuration says.

These make the pool: where they leave nobody, there is no capacity (503). What a profile's filters
drop after them is capacity that may not be used now (429). A rule gives "" or the reason in words;
the first reason found is kept on the candidate, so that `dynamo explain` can tell it. To add one,
write the function and put it into ``RULES`` where its reason should win over those below.
"""

from __future__ import annotations

from collections.abc import Callable

from dynamo_epp.endpoints.worker import Worker

Rule = Callable[[Worker, str], str]


def serves_model(worker: Worker, model: str) -> str:
    """A request whose model is not known ("") may go anywhere."""
    if not model or model in worker.models:
        return ""
    return "serves no model yet" if not worker.models else f"does not serve {model}"


def not_terminating(worker: Worker, _: str) -> str:
    return "terminating" if worker.endpoint.terminating else ""


def not_draining(worker: Worker, _: str) -> str:
    return "draining" if worker.load.draining else ""


def is_ready(worker: Worker, _: str) -> str:
    return "" if worker.endpoint.ready else "not ready"


def circuit_closed(worker: Worker, _: str) -> str:
    """It failed too often lately. Open circuits never keep everybody away."""
    return worker.circuit


RULES: tuple[Rule, ...] = (
    serves_model,
    not_terminating,
    not_draining,
    is_ready,
    circuit_closed,
)


def reason_to_drop(worker: Worker, model: str) -> str:
    """The first reason for which ``worker`` can't serve ``model`` at this moment, or ""."""
    for rule in RULES:
        if reason := rule(worker, model):
            return reason
    return ""
