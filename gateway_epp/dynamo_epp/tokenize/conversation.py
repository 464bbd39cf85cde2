"""Messages and tools as vLLM hands them to a chat template.

Between the client's JSON and the template vLLM validates (which orders keys), joins or wraps text
parts, parses tool-call arguments, drops what it does not know, and fills in nulls. Each step shows
in the prompt of some template, so each is repeated here, to the key order. Rules: vLLM 0.32's
protocol and renderer; what it would refuse raises `NotExact`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_epp.requests import ChatPrompt
from dynamo_epp.tokenize.exact import NotExact
from dynamo_epp.tokenize.template import ContentFormat

Message = dict[str, Any]

# Where vLLM finds the text of a content part, by the part's type.
_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
# Fields of content parts that some API defines; others are handed on to the template.
_PART_FIELDS = frozenset(
    {
        "audio_embeds",
        "audio_url",
        "closed",
        "data",
        "file",
        "image_embeds",
        "image_pil",
        "image_url",
        "input_audio",
        "name",
        "prompt_cache_breakpoint",
        "refusal",
        "text",
        "thinking",
        "type",
        "uuid",
        "video_embeds",
        "video_url",
    }
)
_MAY_BE_NULL = ("assistant", "function")
_BILLING_HEADER = "x-anthropic-billing-header"  # changes with every request; vLLM drops its line
# Arguments of the rendering call itself: a client that sets them changes more than variables.
_CALL_ARGUMENTS = frozenset(
    {
        "self",
        "conversation",
        "tools",
        "chat_template",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


def conversation(messages: Sequence[Message], content_format: ContentFormat) -> list[Message]:
    """The messages as a template sees them. Raises `NotExact` where vLLM refuses them."""
    return [_message(message, content_format) for message in messages]


def _message(message: Message, content_format: ContentFormat) -> Message:
    role = message.get("role")
    if not isinstance(role, str):
        raise NotExact("a message has no role")
    content = message.get("content")
    if content is None:
        if "content" in message and role not in _MAY_BE_NULL:
            raise NotExact(f"the engine refuses null as the content of a message by {role}")
        parts: list[Any] = []
    elif isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = content
    else:
        raise NotExact("a message's content is neither text nor parts")
    if role == "system":
        parts = _without_billing_header(parts)
    wrapped = [_part(part, wrap=content_format == "openai") for part in parts]
    result: Message = {
        "role": role,
        "content": wrapped if content_format == "openai" else "\n".join(wrapped),
    }
    if role == "assistant":
        _add_assistant_fields(result, message)
    elif role == "tool":
        if "tool_call_id" in message:
            result["tool_call_id"] = message["tool_call_id"]
        if content_format == "openai" and all(part["type"] == "text" for part in wrapped):
            result["content"] = "\n".join(part["text"] for part in wrapped)
    name = message.get("name")
    if isinstance(name, str):
        result["name"] = name
    task = message.get("task")
    if isinstance(task, str):
        result["task"] = task
    if role == "developer":
        tools = message.get("tools")
        result["tools"] = [_declared_tool(tool) for tool in tools] if tools is not None else None
    return result


def _part(part: Any, *, wrap: bool) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part} if wrap else part
    if not isinstance(part, dict):
        raise NotExact("a content part is neither text nor an object")
    kind = part.get("type")
    if kind == "tool_reference":
        name = part.get("name")
        if not isinstance(name, str):
            raise NotExact("a tool reference has no name")
        return {"type": "tool_reference", "name": name} if wrap else name
    key = _TEXT_KEYS.get(kind) if isinstance(kind, str) else None
    text = part.get(key) if key else None
    if not isinstance(text, str) or part.get("uuid") is not None:
        raise NotExact(f"a content part of type {kind!r} carries no text")
    if not wrap:
        return text
    extra = {key: value for key, value in part.items() if key not in _PART_FIELDS}
    return {"type": "text", "text": text, **extra}


def _without_billing_header(parts: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for part in parts:
        text = part
        if isinstance(part, dict):
            text = part.get("text") if part.get("type") == "text" else None
        if not isinstance(text, str) or not text.startswith(_BILLING_HEADER):
            kept.append(part)
        elif rest := text.partition("\n")[2]:
            kept.append(rest if isinstance(part, str) else {**part, "text": rest})
    return kept


def _add_assistant_fields(result: Message, message: Message) -> None:
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise NotExact("tool_calls is not an array")
        if calls:  # an empty array would send templates down their tool-call path
            result["tool_calls"] = [_tool_call(call) for call in calls]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")  # the older name
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise NotExact("a message's reasoning is not text")
        result["reasoning"] = result["reasoning_content"] = reasoning


def _tool_call(call: Any) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type") != "function":
        raise NotExact("a tool call is not of type function")
    arguments, name = function.get("arguments"), function.get("name")
    if not (
        isinstance(arguments, str) and isinstance(name, str) and isinstance(call.get("id"), str)
    ):
        raise NotExact("a tool call lacks its id, name or arguments")
    called = {"arguments": _arguments(arguments), "name": name}
    ordered = {"id": call["id"], "function": called | _others(function, called), "type": "function"}
    return ordered | _others(call, ordered)


def _others(fields: Message, known: Message) -> Message:
    return {key: value for key, value in fields.items() if key not in known}


def _arguments(text: str) -> Message:
    """Arguments as an object; `{}` for what is no JSON object, since history cannot be repaired."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _declared_tool(tool: Any) -> Message:
    """A tool in a developer message: validated in place, so only the key order changes."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise NotExact("a developer message's tool has no function name")
    order = ("name", "description", "parameters", "strict")
    ordered = {key: function[key] for key in order if key in function}
    outer: Message = {"function": ordered | _others(function, ordered)}
    if "type" in tool:
        outer["type"] = tool["type"]
    return outer | _others(tool, outer)


def tool_dicts(tools: Sequence[Any] | None) -> list[Message] | None:
    """Tools as vLLM dumps its own classes: fixed key order, nulls for what was left out."""
    if tools is None:
        return None
    if not tools:
        raise NotExact("the engine refuses an empty tools array")
    return [_tool(tool) for tool in tools]


def _tool(tool: Any) -> Message:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise NotExact("a tool is not of type function")
    parameters, description = function.get("parameters"), function.get("description")
    if not isinstance(parameters, dict | None) or not isinstance(description, str | None):
        raise NotExact("a tool's description or parameters have the wrong type")
    dumped: Message = {
        "name": function["name"],
        "description": description,
        "parameters": parameters,
    }
    strict, deferred = function.get("strict"), function.get("defer_loading")
    outer_deferred = tool.get("defer_loading")
    if deferred is None:
        deferred = outer_deferred
    if not all(isinstance(flag, bool | None) for flag in (strict, deferred, outer_deferred)):
        raise NotExact("a tool's strict or defer_loading is not a boolean")
    if strict is not None:
        dumped["strict"] = strict
    if deferred is not None:
        dumped["defer_loading"] = deferred
    result: Message = {"type": "function", "function": dumped}
    if outer_deferred is not None:
        result["defer_loading"] = outer_deferred
    return result


def template_arguments(prompt: ChatPrompt, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the template: server's defaults, client's, then the API's own fields.

    Null and "auto" mean unset in each step, as in vLLM.
    """
    forbidden = _CALL_ARGUMENTS.intersection(prompt.chat_template_kwargs)
    if forbidden:
        raise NotExact(f"chat_template_kwargs sets {', '.join(sorted(forbidden))}")
    own: dict[str, Any] = {
        "add_generation_prompt": prompt.add_generation_prompt,
        "continue_final_message": prompt.continue_final_message,
        "documents": prompt.documents,
        "reasoning_effort": prompt.reasoning_effort,
    }
    if prompt.reasoning_effort is not None and "enable_thinking" not in prompt.chat_template_kwargs:
        own["enable_thinking"] = prompt.reasoning_effort != "none"
    return _merged(defaults, _merged(prompt.chat_template_kwargs, own))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {**base, **{key: value for key, value in over.items() if not _unset(value)}}


def _unset(value: object) -> bool:
    return value is None or value == "auto"


def developer_to_system(messages: list[Message]) -> list[Message]:
    """For templates without a developer role: it becomes system, all system text moves first."""
    renamed = [
        {key: value for key, value in message.items() if key != "tools"} | {"role": "system"}
        if message["role"] == "developer"
        else message
        for message in messages
    ]
    if not any(message["role"] == "system" for message in renamed[1:]):
        return renamed
    texts = [_plain(message["content"]) for message in renamed if message["role"] == "system"]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in renamed if message["role"] != "system")]


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if "text" in part)
    return str(content)
