"""JSON bodies as vLLM reads them, and the one change ever made to them.

vLLM's server parses bodies with Python's `json`: NaN, lone surrogates, a byte-order mark and UTF-16
pass there. msgspec is several times faster and stricter, so it goes first and `json` has the last
word: nothing that the engine would accept is refused here.
"""

from __future__ import annotations

import json
from typing import Any, cast

import msgspec

from dynamo_epp.requests.errors import BadRequest

TRANSFER_KEYS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
"""Fields that steer a worker's cache. Only the picker may set them: an engine follows transfer
parameters blindly, reading another's blocks or dying on incomplete ones; the report mode makes
vLLM announce blocks that it has announced before, which no removal undoes."""

_EXTRA_ARGUMENTS = "vllm_xargs"  # vLLM merges it into the same dict that the fields above go to

_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_object(body: bytes) -> dict[str, Any]:
    """The body's JSON object. Raises `BadRequest` (400) that says where it is broken."""
    value: Any
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        value = _decode_slowly(body)
    if not isinstance(value, dict):
        found = _JSON_NAMES.get(value.__class__, "something else")
        raise BadRequest(
            400, f"The body must be a JSON object, not {found}.", code="body_not_object"
        )
    return value


def _decode_slowly(body: bytes) -> Any:
    if not body.strip():
        raise BadRequest(400, "The body is empty; a JSON object is needed.", code="invalid_json")
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        message = f"The body is not valid JSON: {error.msg} at {where}."
    except UnicodeDecodeError as error:
        message = f"The body is not valid UTF-8: {error.reason} at byte {error.start}."
    except RecursionError:
        raise TooDeep from None
    except ValueError as error:  # an integer with thousands of digits
        message = f"The body is not usable JSON: {error}."
    raise BadRequest(400, message, code="invalid_json")


class TooDeep(BadRequest):
    """How deep a body may be nested depends on the stack that reads it: an engine may read more."""

    def __init__(self) -> None:
        super().__init__(400, "The body is nested too deeply.", code="invalid_json")


_JSON_NAMES: dict[type, str] = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def json_name(value: object) -> str:
    """What JSON calls a decoded value, for messages."""
    return "an object" if isinstance(value, dict) else _JSON_NAMES.get(type(value), "unknown")


def has_transfer_keys(fields: dict[str, Any]) -> bool:
    """Whether the client sent transfer parameters, in either place vLLM reads them from."""
    if any(key in fields for key in TRANSFER_KEYS):
        return True
    extra = fields.get(_EXTRA_ARGUMENTS)
    return isinstance(extra, dict) and any(key in extra for key in TRANSFER_KEYS)


def strip_kv_transfer_params(body: bytes) -> bytes | None:
    """The body without the client's transfer parameters, or None where it has none.

    Values of all other fields keep their bytes. Bodies that are no JSON object give None. Raises
    `BadRequest` for one that is nested too deeply to tell.
    """
    try:
        if not has_transfer_keys(decode_object(body)):
            return None
    except TooDeep:
        raise
    except BadRequest:
        return None
    try:
        raw = _raw_fields.decode(body)
        for key in TRANSFER_KEYS:
            raw.pop(key, None)
        if _EXTRA_ARGUMENTS in raw and bytes(raw[_EXTRA_ARGUMENTS]).lstrip()[:1] == b"{":
            extra = _raw_fields.decode(raw[_EXTRA_ARGUMENTS])
            kept = {key: value for key, value in extra.items() if key not in TRANSFER_KEYS}
            if len(kept) < len(extra):
                raw[_EXTRA_ARGUMENTS] = msgspec.Raw(msgspec.json.encode(kept))
        return msgspec.json.encode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        fields = cast("dict[str, Any]", json.loads(body))
        for key in TRANSFER_KEYS:
            fields.pop(key, None)
        extra_fields = fields.get(_EXTRA_ARGUMENTS)
        if isinstance(extra_fields, dict):
            for key in TRANSFER_KEYS:
                extra_fields.pop(key, None)
        return json.dumps(fields, separators=(",", ":")).encode()


def replace_model(body: bytes, model: str) -> bytes:
    """The body with another ``model``; values of all other fields keep their bytes.

    For a body that `decode_object` reads.
    """
    try:
        raw = _raw_fields.decode(body)
        raw["model"] = msgspec.Raw(msgspec.json.encode(model))
        return msgspec.json.encode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        fields = decode_object(body)
        fields["model"] = model
        return json.dumps(fields, separators=(",", ":")).encode()
