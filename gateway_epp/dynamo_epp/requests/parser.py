"""From an HTTP body to a `ParsedRequest`.

The rule for errors: refuse only what the engine would refuse as well (vLLM 0.32's protocol classes
are the measure: extra fields pass, numbers and booleans may be strings), except for `model`, which
a gateway with several models needs. Whatever is merely unusual passes and is routed by load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynamo_epp.requests.body import decode_object, has_transfer_keys, json_name
from dynamo_epp.requests.errors import BadRequest
from dynamo_epp.requests.prompts import (
    ChatPrompt,
    Encoding,
    Kind,
    ParsedRequest,
    Prompt,
    TextPrompts,
    TokenPrompts,
)

Fields = dict[str, Any]

# A content part with one of these keys carries media, whatever its `type` says (vLLM's rule).
_MEDIA_KEYS = frozenset(
    {
        "audio_embeds",
        "audio_url",
        "image_embeds",
        "image_pil",
        "image_url",
        "input_audio",
        "input_image",
        "prompt_embeds",
        "video_embeds",
        "video_url",
    }
)
_TEXT_PARTS = frozenset(
    ["text", "input_text", "output_text", "refusal", "thinking", "tool_reference"]
)

LONGEST_MODEL = 1024
"""Characters of a model's name, which is kept in journals, queues and log lines. No engine serves a
longer one."""

# pydantic's words for booleans: vLLM accepts them too.
_TRUE = frozenset(["1", "t", "true", "y", "yes", "on"])
_FALSE = frozenset(["0", "f", "false", "n", "no", "off"])


def parse(path: str, body: bytes) -> ParsedRequest:
    """Parse the body of a POST to ``path``, one of `PATHS` (a query string is ignored).

    Raises `BadRequest`: 404 for another path, 400 for a body that the engine would refuse.
    """
    parser = PATHS.get(path.partition("?")[0].rstrip("/"))
    if parser is None:
        known = ", ".join(PATHS)
        raise BadRequest(404, f"No API at {path}; there are {known}.", code="unknown_path")
    return parser(decode_object(body), len(body))


def unparsed(body: bytes | None, why: str) -> ParsedRequest:
    """A request that is routed by load alone, to whatever worker; ``why`` in a sentence.

    Its model is "". Transfer parameters count as there: nothing tells that they are not.
    """
    return ParsedRequest(
        kind=Kind.OTHER,
        model="",
        not_tokenizable=why,
        has_kv_transfer_params=body is not None,
        body_bytes=len(body or b""),
    )


def _chat(fields: Fields, size: int) -> ParsedRequest:
    messages = _messages(fields, "messages")
    max_tokens = _integer(fields, "max_completion_tokens")
    if max_tokens is None:
        max_tokens = _integer(fields, "max_tokens")
    return _request(
        Kind.CHAT,
        fields,
        size,
        _chat_prompt(fields, messages, size, generation_default=True),
        max_tokens=max_tokens,
        n=_integer(fields, "n"),
        messages=messages,
    )


def _completion(fields: Fields, size: int) -> ParsedRequest:
    value = fields.get("prompt")
    reason = ""
    prompt: Prompt | None = None
    if fields.get("prompt_embeds") is not None:
        reason = "the prompt is given as embeddings"
    elif value is None:
        raise BadRequest(400, "`prompt` is required.", "prompt", "missing_field")
    else:
        encoding = _encoding(fields, add_special_tokens=True)
        prompt, reason = _texts_or_tokens(value, "prompt", encoding)
    if fields.get("suffix") is not None:
        prompt, reason = None, "the model's renderer places the suffix"
    max_tokens = _integer(fields, "max_tokens")
    return _request(
        Kind.COMPLETION,
        fields,
        size,
        prompt,
        reason=reason,
        max_tokens=16 if max_tokens is None else max_tokens,  # OpenAI's default, and vLLM's
        n=_integer(fields, "n"),
    )


def _embedding(fields: Fields, size: int) -> ParsedRequest:
    prompt: Prompt | None
    reason = ""
    messages: list[Fields] = []
    if fields.get("messages") is not None:
        batch = fields["messages"]
        if isinstance(batch, list) and batch and all(isinstance(item, list) for item in batch):
            prompt, reason = None, "a batch of conversations"
        else:
            messages = _messages(fields, "messages")
            prompt = _chat_prompt(fields, messages, size, generation_default=False)
    else:
        value = fields.get("input")
        if value is None:
            raise BadRequest(400, "`input` is required.", "input", "missing_field")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if "role" in value[0]:
                messages = _messages(fields, "input")
                prompt = _chat_prompt(fields, messages, size, generation_default=False)
            else:
                prompt, reason = None, "the input is not text"
        else:
            encoding = _encoding(fields, add_special_tokens=True)
            prompt, reason = _texts_or_tokens(value, "input", encoding)
    changed = (
        fields.get("padding") == "max_length" or fields.get("truncate_prompt_tokens") is not None
    )
    if prompt is not None and changed:
        prompt, reason = None, "the engine pads or truncates the prompt"
    return _request(
        Kind.EMBEDDING, fields, size, prompt, reason=reason, max_tokens=0, messages=messages
    )


def _response(fields: Fields, size: int) -> ParsedRequest:
    value = fields.get("input")
    if value is None:
        raise BadRequest(400, "`input` is required.", "input", "missing_field")
    if not isinstance(value, str | list):
        raise _wrong_type("input", "a string or an array of items", value)
    prompt, reason = _response_prompt(fields, value, size)
    return _request(
        Kind.RESPONSE,
        fields,
        size,
        prompt,
        reason=reason,
        max_tokens=_integer(fields, "max_output_tokens"),
    )


def _response_prompt(
    fields: Fields, value: str | list[Any], size: int
) -> tuple[ChatPrompt | None, str]:
    """vLLM turns a response's input into chat messages; plain ones are followed here.

    Left to the engine: history that lives there, tools (expanded by name space), items that are
    not messages, and parts other than one text.
    """
    if fields.get("previous_response_id") is not None:
        return None, "the history of previous_response_id lives in the engine"
    if fields.get("tools"):
        return None, "tools of the Responses API are converted by the engine"
    instructions = fields.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise _wrong_type("instructions", "a string", instructions)
    messages: list[Fields] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in [{"role": "user", "content": value}] if isinstance(value, str) else value:
        plain = (
            isinstance(item, dict)
            and item.keys() <= {"type", "role", "content"}
            and item.get("type", "message") == "message"
            and isinstance(item.get("role"), str)
            and isinstance(item.get("content"), str)
        )
        if not plain:
            return None, "an input item is not a plain message"
        messages.append({"role": item["role"], "content": item["content"]})
    reasoning = fields.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else None
    truncation = fields.get("truncation", "disabled")
    return ChatPrompt(
        messages=messages,
        chat_template_kwargs=_object(fields, "chat_template_kwargs") or {},
        reasoning_effort=effort if isinstance(effort, str) else None,
        encoding=Encoding(
            add_special_tokens=True,  # unlike for chats: vLLM leaves its default here
            truncate_prompt_tokens=None if truncation == "disabled" else -1,
        ),
        body_bytes=size,
    ), ""


PATHS: dict[str, Callable[[Fields, int], ParsedRequest]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embedding,
    "/v1/responses": _response,
}


def _request(
    kind: Kind,
    fields: Fields,
    size: int,
    prompt: Prompt | None,
    *,
    reason: str = "",
    max_tokens: int | None = None,
    n: int | None = None,
    messages: list[Fields] | None = None,
) -> ParsedRequest:
    model = fields.get("model")
    if model is None:
        raise BadRequest(400, "`model` is required.", "model", "missing_field")
    if not isinstance(model, str):
        raise _wrong_type("model", "a string", model)
    if not model:
        raise BadRequest(400, "`model` must not be empty.", "model", "invalid_value")
    if len(model) > LONGEST_MODEL or not _is_unicode(model):
        wanted = f"text of at most {LONGEST_MODEL} characters"
        raise BadRequest(404, f"`model` must be {wanted}.", "model", "model_not_found")
    salt = fields.get("cache_salt")
    if salt is not None and not isinstance(salt, str):
        raise _wrong_type("cache_salt", "a string", salt)
    media = _media(messages or [])
    template = _own_template(fields)
    if media:
        prompt, reason = None, media
    if template:
        prompt, reason = None, "the request brings its own chat template"
    if salt and not _is_unicode(salt):
        prompt, reason, salt = None, "the cache salt is no Unicode text", ""
    return ParsedRequest(
        kind=kind,
        model=model,
        stream=_flag(fields, "stream", False),
        prompt=prompt,
        not_tokenizable=reason,
        multimodal=bool(media),
        untrusted_template=template,
        cache_salt=salt or "",
        max_tokens=max_tokens,
        n=1 if n is None else n,
        has_kv_transfer_params=has_transfer_keys(fields),
        body_bytes=size,
    )


def _is_unicode(text: str) -> bool:
    """Whether ``text`` has no lone surrogates, which JSON can write and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _own_template(fields: Fields) -> bool:
    kwargs = fields.get("chat_template_kwargs")
    inner = kwargs.get("chat_template") if isinstance(kwargs, dict) else None
    return fields.get("chat_template") is not None or inner is not None


def _messages(fields: Fields, name: str) -> list[Fields]:
    messages = fields.get(name)
    if messages is None:
        raise BadRequest(400, f"`{name}` is required.", name, "missing_field")
    if not isinstance(messages, list):
        raise _wrong_type(name, "an array of messages", messages)
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong_type(f"{name}[{index}]", "an object with a role", message)
        role = message.get("role")
        if role is None and "author" not in message:  # a Harmony message has an author instead
            where = f"{name}[{index}].role"
            raise BadRequest(400, f"`{where}` is required.", where, "missing_field")
        if role is not None and not isinstance(role, str):
            raise _wrong_type(f"{name}[{index}].role", "a string", role)
        content = message.get("content")
        if not isinstance(content, str | list | dict | None):
            where = f"{name}[{index}].content"
            raise _wrong_type(where, "a string or an array of parts", content)
    return messages


def _media(messages: list[Fields]) -> str:
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        for part in content:
            if not isinstance(part, dict):
                continue
            kind = part.get("type", "text")
            if not _MEDIA_KEYS.isdisjoint(part):
                return f"message {index} carries {kind if kind != 'text' else 'media'}"
            if not isinstance(kind, str) or kind not in _TEXT_PARTS:
                return f"message {index} has a part of type {kind!r}"
    return ""


def _chat_prompt(
    fields: Fields, messages: list[Fields], size: int, *, generation_default: bool
) -> ChatPrompt:
    tools = fields.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise _wrong_type("tools", "an array", tools)
        for index, tool in enumerate(tools):
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                where = f"tools[{index}]"
                message = f"`{where}` must be an object whose `function` has a `name`."
                raise BadRequest(400, message, where, "invalid_type")
    documents = fields.get("documents")
    if documents is not None and not isinstance(documents, list):
        raise _wrong_type("documents", "an array of objects", documents)
    effort = fields.get("reasoning_effort")
    continues = _flag(fields, "continue_final_message", False)
    generates = _flag(fields, "add_generation_prompt", generation_default)
    if continues and generates and fields.get("add_generation_prompt") is not None:
        raise BadRequest(
            400,
            "`continue_final_message` and `add_generation_prompt` exclude each other.",
            "continue_final_message",
            "invalid_value",
        )
    return ChatPrompt(
        messages=messages,
        tools=tools,
        tool_choice_none=fields.get("tool_choice") == "none",
        add_generation_prompt=generates,
        continue_final_message=continues,
        chat_template_kwargs=_object(fields, "chat_template_kwargs") or {},
        documents=documents,
        reasoning_effort=effort if isinstance(effort, str) else None,
        encoding=_encoding(fields, add_special_tokens=False),
        body_bytes=size,
    )


def _encoding(fields: Fields, *, add_special_tokens: bool) -> Encoding:
    side = fields.get("truncation_side")
    return Encoding(
        add_special_tokens=_flag(fields, "add_special_tokens", add_special_tokens),
        truncate_prompt_tokens=_integer(fields, "truncate_prompt_tokens"),
        truncation_side=side if side in ("left", "right") else None,
    )


def _texts_or_tokens(value: Any, name: str, encoding: Encoding) -> tuple[Prompt | None, str]:
    """Completions and embeddings take text, tokens, or a batch of either."""
    if isinstance(value, str):
        return TextPrompts(texts=[value], encoding=encoding), ""
    if not isinstance(value, list):
        raise _wrong_type(name, "text, tokens, or an array of those", value)
    if all(isinstance(item, str) for item in value):
        if value:
            return TextPrompts(texts=value, encoding=encoding), ""
        return None, "the prompt is empty"
    if all(type(item) is int for item in value):
        return _tokens([value], name, encoding)
    if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
        return _tokens(value, name, encoding)
    for index, item in enumerate(value):
        if isinstance(item, dict) or item is None:
            raise _wrong_type(f"{name}[{index}]", "text or tokens", item)
    return None, "the prompt mixes kinds of values"


def _tokens(
    prompts: list[list[int]], name: str, encoding: Encoding
) -> tuple[TokenPrompts | None, str]:
    for tokens in prompts:
        if tokens and min(tokens) < 0:
            raise BadRequest(400, f"`{name}` has a negative token id.", name, "invalid_value")
    if not all(prompts):
        return None, "a prompt is empty"
    return TokenPrompts(prompts=prompts, encoding=encoding), ""


def _object(fields: Fields, name: str) -> Fields | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise _wrong_type(name, "an object", value)
    return value


def _flag(fields: Fields, name: str, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        word = value.lower()
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
    raise _wrong_type(name, "true or false", value)


def _integer(fields: Fields, name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        try:
            number = float(value)
            return int(value) if "." not in value else int(number)
        except (ValueError, OverflowError):
            pass
    raise _wrong_type(name, "an integer", value)


def _wrong_type(where: str, wanted: str, value: object) -> BadRequest:
    message = f"`{where}` must be {wanted}, not {json_name(value)}."
    return BadRequest(400, message, where, "invalid_type")
