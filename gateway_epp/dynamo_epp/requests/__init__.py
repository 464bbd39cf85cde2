"""OpenAI's request bodies: parsed for routing, checked, never interpreted beyond that."""

from dynamo_epp.requests.body import replace_model, strip_kv_transfer_params
from dynamo_epp.requests.content import prompt_bytes
from dynamo_epp.requests.errors import BadRequest, error_body
from dynamo_epp.requests.parser import PATHS, parse, unparsed
from dynamo_epp.requests.prompts import (
    ChatPrompt,
    Encoding,
    Kind,
    ParsedRequest,
    Prompt,
    TextPrompts,
    TokenPrompts,
)

__all__ = [
    "PATHS",
    "BadRequest",
    "ChatPrompt",
    "Encoding",
    "Kind",
    "ParsedRequest",
    "Prompt",
    "TextPrompts",
    "TokenPrompts",
    "error_body",
    "parse",
    "prompt_bytes",
    "replace_model",
    "strip_kv_transfer_params",
    "unparsed",
]
