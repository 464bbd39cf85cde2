"""From a chat request to prompt tokens, as vLLM does it.

vLLM changes a conversation before the template sees it (parts become one string where the template
knows only strings, arguments of tool calls become objects, tools get their absent fields as null,
`developer` becomes `system` where the template does not know it), and these changes decide about
the prompt's tokens. The engine must make the same ones, or its prefixes would match nobody's.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from dynamo_workers.sim.errors import RequestError

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and the field that the text stands in."""


class ModelFolderError(Exception):
    """A folder that holds no usable tokenizer; the message names the file."""


class Renderer:
    """Tokenizer and chat template of one model folder."""

    def __init__(
        self, folder: Path, *, template: str | None = None, content_format: str = "auto"
    ) -> None:
        """Reads tokenizer.json and tokenizer_config.json (absent: no template, no special tokens).

        `template` replaces the folder's own; `content_format` is "auto", "string" or "openai".
        """
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ModelFolderError(f"{folder / 'tokenizer.json'}: {error}") from error
        config = _read_config(folder / "tokenizer_config.json")
        if template is None:
            template = _folder_template(folder, config)
        self._special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        end = self._special.get("eos_token")
        self.end_id: int | None = None if end is None else self.tokenizer.token_to_id(end)
        self._template = None
        self._knows_developer = False
        self.content_format = content_format
        if template is not None:
            environment = _environment()
            self._template = environment.from_string(template)
            self._knows_developer = '"developer"' in template or "'developer'" in template
            if content_format == "auto":
                self.content_format = _content_format(environment.parse(template))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text (such as a bos)."""
        # The batch call is the one that leaves out offsets, a third of the time.
        encoded = self.tokenizer.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoded[0].ids
        return ids

    def decode(self, tokens: list[int], *, skip_special: bool = False) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special)
        return text

    def render(self, body: Mapping[str, Any]) -> str:
        """The prompt of a chat request (`messages`, `tools`, `add_generation_prompt`, …)."""
        if self._template is None:
            raise RequestError(
                "This model has no chat template; use /v1/completions, or start the engine with "
                "--chat-template."
            )
        if body.get("chat_template") is not None:
            raise RequestError(
                "Chat template is passed with request, but only the model's own is used. "
                "Refused request with untrusted chat template."
            )
        continue_final = body.get("continue_final_message") is True
        generation = body.get("add_generation_prompt", True) is True
        if continue_final and generation:
            raise RequestError(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
            )
        messages = self._conversation(body.get("messages"))
        variables = dict(self._special)
        variables |= _object(body, "chat_template_kwargs")
        try:
            text = self._template.render(
                variables,
                messages=messages,
                tools=_tools(body.get("tools")),
                documents=body.get("documents"),
                add_generation_prompt=generation,
            )
        except jinja2.TemplateError as error:
            raise RequestError(str(error)) from error
        return _cut_after_last(text, messages[-1]) if continue_final else text

    def _conversation(self, messages: Any) -> list[dict[str, Any]]:
        if not isinstance(messages, list):
            raise RequestError("messages must be a list of messages.", param="messages")
        if not messages:
            raise RequestError(
                "Cannot apply chat template to an empty conversation. Provide at least one message."
            )
        as_parts = self.content_format == "openai"
        conversation = [_message(message, as_parts=as_parts) for message in messages]
        if not self._knows_developer and any(m["role"] == "developer" for m in conversation):
            for message in conversation:
                if message["role"] == "developer":
                    message["role"] = "system"
            conversation = _one_system_message(conversation)
        return conversation


def _environment() -> jinja2.Environment:
    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _content_format(template: jinja2.nodes.Template) -> str:
    """ "openai" if the template loops over a message's content, "string" if it only prints it."""
    for loop in template.find_all(jinja2.nodes.For):
        node: jinja2.nodes.Node | None = loop.iter
        while isinstance(node, jinja2.nodes.Filter):
            node = node.node
        if isinstance(node, jinja2.nodes.Name) and node.name == "content":
            return "openai"
        if isinstance(node, jinja2.nodes.Getattr) and node.attr == "content":
            return "openai"
        if (
            isinstance(node, jinja2.nodes.Getitem)
            and isinstance(node.arg, jinja2.nodes.Const)
            and node.arg.value == "content"
        ):
            return "openai"
    return "string"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelFolderError(f"{path}: an object is expected")
    return config


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _message(message: Any, *, as_parts: bool) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError("each message must be an object with a role.", param="messages")
    role = message["role"]
    content = message.get("content")
    if content is None:
        parts: list[Any] = []
    elif isinstance(content, str):
        parts = [content]
    elif isinstance(content, list):
        parts = content
    else:
        raise RequestError(
            "content must be a string, a list of parts or null.", param="messages.content"
        )
    texts = [text for text in (_part_text(part) for part in parts) if text is not None]
    result: dict[str, Any] = {"role": role}
    if as_parts and role != "tool":
        result["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        result["content"] = "\n".join(texts)
    if role == "assistant":
        calls = message.get("tool_calls")
        if calls:
            result["tool_calls"] = [_tool_call(call) for call in calls]
        if message.get("reasoning") is not None:
            result["reasoning"] = result["reasoning_content"] = message["reasoning"]
    if role == "tool" and "tool_call_id" in message:
        result["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        result["name"] = message["name"]
    return result


def _part_text(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise RequestError(f"Unsupported chat content part type: {kind!r}; this model reads text.")
    text = part.get(TEXT_PARTS[kind])
    if text is not None and not isinstance(text, str):
        raise RequestError("the text of a content part must be a string.", param="messages.content")
    return text


def _tool_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RequestError("assistant tool_calls entries must be objects.", param="tool_calls")
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, dict):
        raise RequestError(
            "chat completions only support assistant tool_calls of type 'function'.",
            param="tool_calls",
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    # What is not an object would break templates and with them every later turn.
    if not isinstance(arguments, dict):
        arguments = {}
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RequestError("tools must be a list.", param="tools")
    result = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError("each tool must have a function with a name.", param="tools")
        whole = {
            "name": function["name"],
            "description": function.get("description"),
            "parameters": function.get("parameters"),
        }
        result.append({"type": tool.get("type", "function"), "function": {**whole, **function}})
    return result


def _one_system_message(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One system message in front where there are several, or one that is not the first."""
    positions = [i for i, message in enumerate(conversation) if message["role"] == "system"]
    if positions == [0]:
        return conversation
    texts = []
    for position in positions:
        content = conversation[position]["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        if content:
            texts.append(content)
    others = [message for message in conversation if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others]


def _cut_after_last(text: str, message: dict[str, Any]) -> str:
    """Ends the prompt right after the last message's text, so that the answer continues it."""
    content = message["content"]
    if isinstance(content, list):
        content = content[-1]["text"] if content else ""
    position = text.rfind(content.strip())
    if position < 0 or not content.strip():
        raise RequestError(
            "continue_final_message is set but the final message does not appear in the prompt."
        )
    length = len(content) if text.startswith(content, position) else len(content.strip())
    return text[: position + length]


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object.", param=name)
    return value
