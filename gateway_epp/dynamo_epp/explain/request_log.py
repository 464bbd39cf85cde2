"""The access log: one line for each request that ended, with the decision in it.

Lines go to the logger ``access``, as JSON where logs are collected. Off unless asked for: at
thousands of requests a second a line for each costs more than the picks.
"""

from __future__ import annotations

import logging
from typing import Any

from dynamo_epp.explain.entries import LONGEST, Entry, Refused
from dynamo_epp.server import AccessEntry

log = logging.getLogger("access")

TOLD = {
    "status": "status",
    "flags": "flags",
    "attempts": "attempts",
    "upstream": "upstream",
    "served_by": "served_by",
    "prefilled_by": "prefilled_by",
    "cached_tokens": "cached_tokens",
    "completion_tokens": "completion_tokens",
    "first_token_s": "ttft_s",
    "duration_s": "duration_s",
}
"""What came after, by its name in ``Entry.outcome`` -> its name in the line."""


def fields(entry: Entry | Refused) -> dict[str, Any]:
    """One request's line, as plain data. What is not known is not in it."""
    line: dict[str, Any] = {
        "request_id": entry.request_id,
        "path": entry.path,
        "model": entry.model,
    }
    if entry.tenant:
        line["tenant"] = entry.tenant
    if isinstance(entry, Refused):
        line |= {"how": "refused", "reason": entry.reason}
    else:
        line |= _decided(entry)
    for name, key in TOLD.items():
        if name in entry.outcome:
            line[key] = entry.outcome[name]
    return line


def _decided(entry: Entry) -> dict[str, Any]:
    shell, chosen = entry.kept.shell, entry.kept.chosen
    line: dict[str, Any] = {
        "stream": entry.stream,
        "how": str(shell.how),
        "mode": shell.mode,
        "reason": entry.reason,
        "worker": entry.worker,
    }
    if entry.disagg is not None:
        line |= {"disagg": entry.disagg.decision, "disagg_reason": entry.disagg.reason}
    if chosen is not None:
        line |= {"overlap_blocks": chosen.candidate.overlap_blocks, "blocks": shell.size.blocks}
    if entry.prompt_tokens >= 0:
        line |= {
            "prompt_tokens": entry.prompt_tokens,
            "predicted_cached_tokens": entry.predicted_cached_tokens,
        }
    return line


def ended(entry: Entry | Refused) -> None:
    """Write a request's line."""
    status = entry.outcome.get("status", "no status")
    log.info("%s %s", entry.path, status, extra={"fields": fields(entry)})


def ended_in_the_proxy(logged: AccessEntry) -> None:
    """Write the line of a request that the proxy answered without asking the picker."""
    line: dict[str, Any] = {
        "request_id": logged.request_id,
        "path": logged.path[:LONGEST],
        "how": "proxy",
        "reason": logged.details,
        "status": logged.status,
    }
    if logged.flags:
        line["flags"] = ",".join(logged.flags)
    if logged.last_byte_s is not None:
        line["duration_s"] = round(logged.last_byte_s, 6)
    log.info("%s %s", line["path"], logged.status, extra={"fields": line})
