"""AdmissionReview, the API server's question, and the answer (admission.k8s.io/v1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

API_VERSION = "admission.k8s.io/v1"
CREATE, UPDATE = "CREATE", "UPDATE"

MOST_WARNINGS = 10
LONGEST_WARNING = 255
"""The API server cuts single warnings after 256 characters and drops all after 4 KiB."""


class Malformed(ValueError):
    """A body that is no review; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Request:
    """One object that somebody wants to write, in the version in which it was sent."""

    uid: str
    operation: str
    """CREATE, UPDATE, DELETE, CONNECT."""
    kind: str
    namespace: str
    object: Json | None
    """What would be stored; None for DELETE."""
    old: Json | None = None
    """What is stored, converted to the version of `object`; None for CREATE."""
    dry_run: bool = False
    """Whether nothing will be stored. It makes no difference here: reviews have no side effects."""


@dataclass(frozen=True, slots=True)
class Denial:
    """One reason for which a request is refused."""

    field: str
    """Path in the author's manifest."""
    message: str
    """What is wrong and what would be right; it is shown after the field."""
    reason: str
    """For metrics: "invalid", "immutable" or "dry_run"."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def read_request(review: Any) -> Request:
    """The request of an AdmissionReview. Raises `Malformed`."""
    request = review.get("request") if isinstance(review, Mapping) else None
    if not isinstance(request, Mapping) or review.get("apiVersion") != API_VERSION:
        raise Malformed(f"expected an AdmissionReview of {API_VERSION} with a request")
    uid, kind = request.get("uid"), request.get("kind")
    if not isinstance(uid, str) or not isinstance(kind, Mapping):
        raise Malformed("expected request.uid and request.kind")
    return Request(
        uid=uid,
        operation=str(request.get("operation") or ""),
        kind=str(kind.get("kind") or ""),
        namespace=str(request.get("namespace") or ""),
        object=_object(request, "object"),
        old=_object(request, "oldObject"),
        dry_run=request.get("dryRun") is True,
    )


def _object(request: Mapping[str, Any], name: str) -> Json | None:
    value = request.get(name)
    if value is not None and not isinstance(value, dict):
        raise Malformed(f"expected an object in request.{name}")
    return value


def answer(request: Request, denials: Sequence[Denial], warnings: Sequence[str]) -> Json:
    """The AdmissionReview that answers a request: denied if there is any denial."""
    response: Json = {"uid": request.uid, "allowed": not denials}
    if denials:
        response["status"] = _status(request, denials)
    if shown := shortened(warnings):
        response["warnings"] = shown
    return {"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response}


def _status(request: Request, denials: Sequence[Denial]) -> Json:
    """As the API server refuses what its schemas don't allow, so that clients show both alike;
    kubectl shows the causes and not the message."""
    unique = list(dict.fromkeys(denials))
    texts = [str(denial) for denial in unique]
    message = texts[0] if len(texts) == 1 else "\n* ".join([f"{len(texts)} mistakes:", *texts])
    metadata = (request.object or {}).get("metadata") or {}
    return {
        "status": "Failure",
        "code": 422,
        "reason": "Invalid",
        "message": message,
        "details": {
            "kind": request.kind,
            "name": metadata.get("name") or metadata.get("generateName") or "",
            "causes": [
                {"field": d.field, "reason": "FieldValueInvalid", "message": d.message}
                for d in unique
            ],
        },
    }


def shortened(warnings: Sequence[str]) -> list[str]:
    """The warnings that fit: each once, in one line, none too long, not too many."""
    lines = list(dict.fromkeys(" ".join(warning.split()) for warning in warnings))
    lines = [t if len(t) <= LONGEST_WARNING else t[: LONGEST_WARNING - 1] + "…" for t in lines]
    if len(lines) > MOST_WARNINGS:
        rest = len(lines) - MOST_WARNINGS + 1
        lines = [*lines[: MOST_WARNINGS - 1], f"and {rest} more; `dynamo render` shows them all"]
    return lines
