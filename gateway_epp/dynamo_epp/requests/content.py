"""What a prompt is made of, as bytes: to recognize it again where its tokens are not known."""

from __future__ import annotations

from array import array

import msgspec

from dynamo_epp.requests.prompts import ChatPrompt, ParsedRequest, TextPrompts, TokenPrompts

_encode = msgspec.json.Encoder().encode


def prompt_bytes(request: ParsedRequest, body: bytes) -> bytes:
    """Equal prompts give equal bytes, and prompts that begin alike give bytes that do.

    Fields of the request that the prompt does not depend on are left out. Where the prompt was not
    understood, or can't be written (half a surrogate pair), it is the body as it came.
    """
    try:
        match request.prompt:
            case ChatPrompt() as chat:
                tools = _encode(chat.tools) if chat.tools else b""
                return tools + _encode(chat.messages)
            case TextPrompts() as texts:
                return "\0".join(texts.texts).encode()
            case TokenPrompts() as tokens:
                return b"".join(array("q", prompt).tobytes() for prompt in tokens.prompts)
    except (UnicodeEncodeError, OverflowError, TypeError):
        pass
    return body
