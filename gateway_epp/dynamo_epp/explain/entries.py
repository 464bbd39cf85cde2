"""What is known of one request: the decision, or why there was none, and how it went.

What the workers and Envoy tell later is added to the same object, so that one lookup gives pick,
outcome and the engine's own counts side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dynamo_kv_router.choice import Candidate, Decision, Scored
from msgspec.structs import asdict

from dynamo_epp.explain.compact import Kept
from dynamo_epp.explain.reasons import why
from dynamo_epp.scheduling.disagg import Pairing

LONGEST = 256
"""Characters kept of what a client wrote: paths, and what is quoted in reasons, have any length."""
LONGEST_REASON = 1024
"""Characters kept of a sentence that may quote it."""


@dataclass(frozen=True, slots=True, eq=False)
class Disagg:
    """How prefill and decode were picked together, packed."""

    decision: str  # prefill-decode, decode-only, refused
    reason: str
    generation: str
    routing: str
    prefillers: tuple[str, ...]  # ip:port, best first
    prefill: Kept | None  # where prefill workers were looked at

    @classmethod
    def of(cls, pairing: Pairing) -> Disagg | None:
        if pairing.split is None:
            return None
        return cls(
            decision=str(pairing.split),
            reason=str(pairing.why or ""),
            generation=pairing.generation,
            routing=pairing.routing(),
            prefillers=pairing.prefillers,
            prefill=Kept.of(pairing.prefill) if pairing.prefill is not None else None,
        )

    def brief(self) -> dict[str, Any]:
        """Plain data, without the candidates."""
        return {
            "decision": self.decision,
            "reason": self.reason,
            "generation": self.generation,
            "prefillers": list(self.prefillers),
            "candidates": [],
        }


@dataclass(slots=True, eq=False)
class Entry:
    """One request in the journal."""

    request_id: str
    time: float  # Unix seconds of the pick
    path: str
    model: str
    stream: bool
    kept: Kept
    reason: str  # why the decision is not exact; "" if it is
    prompt_tokens: int  # -1 if the prompt was not tokenized
    stages_ms: dict[str, float]  # in the order in which they ran, one after the other
    predicted_cached_tokens: int = -1  # of the prompt, on the pick; -1 if it was not tokenized
    tenant: str = ""
    disagg: Disagg | None = None  # None where workers are not split
    outcome: dict[str, Any] = field(default_factory=dict)
    """What came after: status, upstream, attempts, duration_s (Envoy); served_by, blind_window_s,
    first_token_s, prompt_tokens, cached_tokens, completion_tokens (worker); prefilled_by,
    prefill_s, prefill_cached_tokens (prefill worker), prefillers_failed."""

    def __post_init__(self) -> None:
        self.path = self.path[:LONGEST]
        self.reason = self.reason[:LONGEST_REASON]

    @property
    def decision(self) -> Decision:
        """Unpacked at every use; of many candidates only those that say something."""
        return self.kept.unpack()

    @property
    def worker(self) -> str:
        """Name of the pick; "" if there was none."""
        return self.kept.chosen.candidate.name if self.kept.chosen else ""

    @property
    def workers(self) -> tuple[str, ...]:
        """Those that had to do with the request: the pick, who answered if that was another, and
        who did the prefill for it."""
        others = (self.outcome.get(name) for name in ("served_by", "prefilled_by"))
        return (self.worker, *(name for name in others if name))

    def brief(self) -> dict[str, Any]:
        """Plain data for lists: all but the candidates."""
        shell, chosen = self.kept.shell, self.kept.chosen
        return {
            "request_id": self.request_id,
            "time": self.time,
            "path": self.path,
            "model": self.model,
            "stream": self.stream,
            "tenant": self.tenant,
            "how": str(shell.how),
            "mode": shell.mode,
            "profile": shell.profile,
            "scorers": dict(shell.scorers),
            "reason": self.reason,
            "worker": self.worker,
            "endpoint": chosen.candidate.endpoint if chosen else "",
            "overlap_blocks": chosen.candidate.overlap_blocks if chosen else 0,
            "prompt_tokens": self.prompt_tokens,
            "predicted_cached_tokens": self.predicted_cached_tokens,
            "block_size": shell.size.block_size,
            "blocks": shell.size.blocks,
            "disagg": self.disagg.brief() if self.disagg is not None else None,
            "stages_ms": self.stages_ms,
            "outcome": self.outcome,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data, complete."""
        decision = self.decision
        told = {
            **self.brief(),
            "routing": decision.routing(),
            "candidates": _candidates(decision),
            "left_out": dict(self.kept.left_out),
        }
        if self.disagg is not None:
            told["routing"] = self.disagg.routing
            if self.disagg.prefill is not None:
                told["disagg"]["candidates"] = _candidates(self.disagg.prefill.unpack())
                told["disagg"]["left_out"] = dict(self.disagg.prefill.left_out)
        return told


def _candidates(decision: Decision) -> list[dict[str, Any]]:
    return [
        *(
            _ranked(decision, scored, sentence)
            for scored, sentence in zip(decision.ranked, why(decision), strict=True)
        ),
        *(_dropped(candidate) for candidate in decision.dropped),
    ]


def _ranked(decision: Decision, scored: Scored, sentence: str) -> dict[str, Any]:
    names = (name for name, _ in decision.scorers)
    return {
        **asdict(scored.candidate),
        "cost": None if decision.profile else scored.cost,
        "score": -scored.cost if decision.profile else None,
        "scores": dict(zip(names, scored.scores, strict=True)),
        "terms": decision.terms(scored),
        "why": sentence,
    }


def _dropped(candidate: Candidate) -> dict[str, Any]:
    nothing: dict[str, Any] = {"cost": None, "score": None, "scores": {}, "terms": {}}
    return {**asdict(candidate), **nothing, "why": candidate.dropped}


@dataclass(slots=True, eq=False)
class Refused:
    """A request that was answered before there was anything to choose."""

    request_id: str
    time: float  # Unix seconds
    path: str
    model: str  # as the client wrote it; "" if it was not read
    reason: str  # one word, as metrics have it: bad-request, unknown-model, …
    message: str  # what the client was told
    tenant: str = ""
    stages_ms: dict[str, float] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = self.path[:LONGEST]
        self.model = self.model[:LONGEST]
        self.message = self.message[:LONGEST_REASON]

    @property
    def workers(self) -> tuple[str, ...]:
        return ()

    def brief(self) -> dict[str, Any]:
        """The fields of a decision's, so that both go into one list."""
        return {
            "request_id": self.request_id,
            "time": self.time,
            "path": self.path,
            "model": self.model,
            "stream": False,
            "tenant": self.tenant,
            "how": "refused",
            "mode": "",
            "profile": "",
            "scorers": {},
            "reason": f"{self.reason}: {self.message}",
            "worker": "",
            "endpoint": "",
            "overlap_blocks": 0,
            "prompt_tokens": -1,
            "predicted_cached_tokens": -1,
            "block_size": 0,
            "blocks": 0,
            "disagg": None,
            "stages_ms": self.stages_ms,
            "outcome": self.outcome,
        }

    def to_json(self) -> dict[str, Any]:
        """The fields of a decision's."""
        return {**self.brief(), "routing": "", "candidates": [], "left_out": {}}
