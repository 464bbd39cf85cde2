"""ConversionReview: objects in the version that a client asked for (apiextensions.k8s.io/v1).

The API server asks whenever an object is read or written in a version other than the stored one,
with as many objects at a time as a list has. One that can't be converted fails the whole review:
that is the protocol, so the message names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_crds.conversion import convert
from dynamo_crds.problem import show_path, show_value
from pydantic import ValidationError

from dynamo_operator.admission.review import Json, Malformed

API_VERSION = "apiextensions.k8s.io/v1"


def answer(review: Any) -> Json:
    """The ConversionReview that answers `review`. Raises `Malformed`."""
    request = review.get("request") if isinstance(review, Mapping) else None
    if not isinstance(request, Mapping) or review.get("apiVersion") != API_VERSION:
        raise Malformed(f"expected a ConversionReview of {API_VERSION} with a request")
    uid, wanted = request.get("uid"), request.get("desiredAPIVersion")
    objects = request.get("objects")
    if not (isinstance(uid, str) and isinstance(wanted, str) and isinstance(objects, list)):
        raise Malformed("expected request.uid, request.desiredAPIVersion and request.objects")
    converted: list[Json] = []
    for item in objects:
        try:
            converted.append(convert(item, wanted))
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            result = {"status": "Failed", "message": _explained(item, wanted, error)}
            return _review({"uid": uid, "convertedObjects": [], "result": result})
    return _review({"uid": uid, "convertedObjects": converted, "result": {"status": "Success"}})


def _review(response: Json) -> Json:
    return {"apiVersion": API_VERSION, "kind": "ConversionReview", "response": response}


def _explained(item: Any, wanted: str, error: Exception) -> str:
    """Which object, which field, what is wrong."""
    if not isinstance(item, Mapping):
        return f"expected an object, found {show_value(item)}"
    metadata = item.get("metadata")
    names = metadata if isinstance(metadata, Mapping) else {}
    what = f"{item.get('kind')} {names.get('namespace', '')}/{names.get('name', '')}"
    if not isinstance(error, ValidationError):
        return f"{what}: {error or type(error).__name__}"
    details = error.errors()
    first = details[0]
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    found = show_value(first["input"])
    return (
        f"{what} can't be converted to {wanted}: {show_path(first['loc'])}: {first['msg']}, "
        f"found {found}{more}"
    )
