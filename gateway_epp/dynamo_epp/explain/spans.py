"""A pick as a span: OpenTelemetry's names for what it has names for, ours for the decision.

GenAI semantic conventions: ``gen_ai.operation.name``, ``gen_ai.request.*``,
``gen_ai.usage.input_tokens``; general ones: ``server.*`` (the engine), ``error.type``.
"""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_runtime.tracing import Attribute, Tracing

from dynamo_epp.explain.entries import Entry, Refused
from dynamo_epp.requests import Kind, ParsedRequest

OPERATIONS = {
    Kind.CHAT: "chat",
    Kind.COMPLETION: "text_completion",
    Kind.EMBEDDING: "embeddings",
    Kind.RESPONSE: "chat",
}
"""Requests of other kinds, such as those without a body, have no operation."""
NAME = "pick"
LARGEST = 2**63 - 1


def attributes(entry: Entry, parsed: ParsedRequest) -> dict[str, Attribute]:
    """Everything about a decision that a span should have."""
    shell, chosen = entry.kept.shell, entry.kept.chosen
    result: dict[str, Attribute] = {
        "gen_ai.request.model": entry.model,
        "gen_ai.request.stream": entry.stream,
        "dynamo.request_id": entry.request_id,
        "dynamo.routing.how": str(shell.how),
        "dynamo.routing.mode": shell.mode,
        "dynamo.routing.blocks": shell.size.blocks,
    }
    if operation := OPERATIONS.get(parsed.kind):
        result["gen_ai.operation.name"] = operation
    if parsed.max_tokens is not None:
        # A client's number has any size; one that OTLP can't write would cost the whole batch.
        result["gen_ai.request.max_tokens"] = min(parsed.max_tokens, LARGEST)
    if entry.prompt_tokens >= 0:
        result["gen_ai.usage.input_tokens"] = entry.prompt_tokens
        result["dynamo.routing.predicted_cached_tokens"] = entry.predicted_cached_tokens
    if entry.reason:
        result["dynamo.routing.reason"] = entry.reason
    if entry.disagg is not None:
        result["dynamo.disagg.decision"] = entry.disagg.decision
        result["dynamo.disagg.reason"] = entry.disagg.reason
    if entry.tenant:
        result["dynamo.tenant"] = entry.tenant
    if chosen is not None:
        address, _, port = chosen.candidate.endpoint.rpartition(":")
        result |= {
            "server.address": address.strip("[]"),
            "server.port": int(port),
            "dynamo.routing.worker": chosen.candidate.name,
            "dynamo.routing.overlap_blocks": chosen.candidate.overlap_blocks,
            "dynamo.routing.cost": chosen.cost,
        }
    return result


def decided(
    tracing: Tracing,
    headers: Mapping[str, str],
    entry: Entry,
    parsed: ParsedRequest,
    end_s: float,
    error: str = "",
) -> tuple[tuple[str, str], ...]:
    """Record a decision that was made at ``end_s`` (Unix seconds); ``error`` says why nobody was
    chosen. Returns the headers that let the engine go on with the trace."""
    described = attributes(entry, parsed)
    if error:
        described["error.type"] = error
    stages = list(entry.stages_ms.items())
    onward = tracing.record(NAME, headers, int(end_s * 1e9), stages, described, error)
    return tuple(onward.items())


def refused(tracing: Tracing, headers: Mapping[str, str], what: Refused) -> None:
    """Record a request that was answered before there was anything to choose."""
    described: dict[str, Attribute] = {
        "dynamo.request_id": what.request_id,
        "error.type": what.reason,
        "http.response.status_code": what.outcome["status"],
    }
    if what.model:
        described["gen_ai.request.model"] = what.model
    if what.tenant:
        described["dynamo.tenant"] = what.tenant
    stages = list(what.stages_ms.items())
    tracing.record(NAME, headers, int(what.time * 1e9), stages, described, what.reason)
