"""A model's tokenizer and chat template, from the files that its workers serve.

The tokens must be the engine's own, so loading follows transformers (which tokens are added, which
template counts, what templates see) and rendering follows vLLM. Where that cannot be done exactly,
`NotExact` says why: an inexact tokenization is worse than none.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from dynamo_epp.requests import ChatPrompt, Encoding, Prompt, TextPrompts, TokenPrompts
from dynamo_epp.tokenize.conversation import (
    conversation,
    developer_to_system,
    template_arguments,
    tool_dicts,
)
from dynamo_epp.tokenize.exact import NotExact, TooCostly
from dynamo_epp.tokenize.segments import SegmentCache, Tokens, boundaries, proves_segmentation
from dynamo_epp.tokenize.template import ChatTemplate

# Requests are many and their new stretches short: handing those to the library's own threads costs
# more than it gives. The library reads this at every call.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# vLLM renders these with code of their own instead of a template.
_NATIVE_MODES = frozenset(
    ["mistral", "deepseek_v32", "deepseek_v4", "deepseek_v41", "cohere", "kimi_k3", "inkling"]
)
_NATIVE_MODELS = frozenset(["gpt_oss", "deepseek_v32", "deepseek_v4", "kimi_k3", "inkling"])
# transformers 5 rebuilds these from the vocabulary, with other steps than tokenizer.json states.
_REBUILT_CLASSES = frozenset(("LlamaTokenizer", "LlamaTokenizerFast"))
_REBUILT_MODELS = frozenset(("", "llama", "code_llama", "idefics", "idefics2"))
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers puts it after the text to continue
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_HIGHEST_TOKEN = 2**32 - 1


class Tokenizer:
    """Exact tokens for one model's prompts. Methods are synchronous and safe across threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        segments: SegmentCache | None = None,
        segmentation: str = "",
        templates: Mapping[str, ChatTemplate] | None = None,
        no_template: str = "the model has no chat template",
        special_tokens: Mapping[str, str] | None = None,
        content_format: str = "auto",
        template_defaults: Mapping[str, Any] | None = None,
        tools_excluded_when_none: bool = False,
        max_model_len: int = 0,
    ) -> None:
        self._backend = backend
        self._segments = segments
        self.segmentation = segmentation
        """Why turns are (not) tokenized piecewise."""
        self._templates = dict(templates or {})
        self._no_template = no_template
        self._special_tokens = dict(special_tokens or {})
        self._content_format = content_format
        self._template_defaults = dict(template_defaults or {})
        self._tools_excluded_when_none = tools_excluded_when_none
        self._max_model_len = max_model_len
        longest = max(map(len, backend.get_vocab()), default=0)
        self._most_characters = max_model_len * longest or None
        self.template_disabled = ""
        """Why chats are not rendered any more; set once rendering ran out of time."""

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], settings: Mapping[str, str]) -> Tokenizer:
        """Load from file name → content, as found in a model's folder.

        Reads `tokenizer.json` (needed), `tokenizer_config.json`, `special_tokens_map.json`,
        `chat_template.jinja`, `additional_chat_templates/*.jinja` and `config.json`. ``settings``
        are the engine's flags, underscored: `chat_template` (a file's name or a template),
        `chat_template_content_format`, `default_chat_template_kwargs` (JSON), `tokenizer_mode`,
        `exclude_tools_when_tool_choice_none`, `max_model_len`.

        Raises `NotExact` if the files cannot give the engine's tokens. Takes about half a second
        for a vocabulary of 128,000.
        """
        if "tokenizer.json" not in files:
            raise NotExact("the worker serves no tokenizer.json")
        definition = _object(files, "tokenizer.json")
        config = _object(files, "tokenizer_config.json")
        model_type = str(_object(files, "config.json").get("model_type", "")).replace("-", "_")
        mode = settings.get("tokenizer_mode", "auto")
        if mode in _NATIVE_MODES or settings.get("skip_tokenizer_init") == "true":
            raise NotExact(f"the engine's tokenizer mode {mode} uses no tokenizer.json")
        if (
            config.get("tokenizer_class") in _REBUILT_CLASSES
            and model_type in _REBUILT_MODELS
            and not _is_rebuilt_form(definition)
        ):
            raise NotExact("the engine rebuilds a LlamaTokenizer with other rules than its file's")
        try:
            backend = Backend.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the library raises plain Exception
            raise NotExact(f"tokenizer.json does not load: {error}") from error
        named = _named_tokens(config, _object(files, "special_tokens_map.json"))
        _add_missing_tokens(backend, config, named)
        backend.no_truncation()
        backend.no_padding()
        split_special = bool(config.get("split_special_tokens", False))
        backend.encode_special_tokens = split_special
        no_template = "the model has no chat template"
        if model_type in _NATIVE_MODELS:
            templates: dict[str, ChatTemplate] = {}
            no_template = f"the engine renders chats of {model_type} by code of its own"
        else:
            templates, no_template = _templates(files, config, settings, no_template)
        tokenizer = cls(
            backend,
            templates=templates,
            no_template=no_template,
            special_tokens={name: str(token) for name, token in named.items()},
            content_format=settings.get("chat_template_content_format") or "auto",
            template_defaults=_json_setting(settings, "default_chat_template_kwargs"),
            tools_excluded_when_none=settings.get("exclude_tools_when_tool_choice_none") == "true",
            max_model_len=int(settings.get("max_model_len") or 0),
        )
        if split_special:
            tokenizer.segmentation = "special tokens are split like text"
        else:
            tokenizer._enable_segments(definition)
        return tokenizer

    def _enable_segments(self, definition: Mapping[str, Any]) -> None:
        proven = {**definition, "added_tokens": _added_tokens(self._backend)}
        holds, self.segmentation = proves_segmentation(proven)
        if not holds:
            return
        first, second = boundaries(proven)
        cache = SegmentCache((first, second), self._encode_stretches)
        for text in _probes([*first, *second]):
            if not np.array_equal(cache.tokens(cache.pieces(text)), self._encode_plain(text)):
                self.segmentation = f"cut text gave other tokens in the self-test, for {text!r}"
                return
        cache.clear()
        self._segments = cache

    def disable_segments(self) -> None:
        """Tokenize every text as a whole: what the cache is measured and tested against."""
        self._segments = None
        self.segmentation = "switched off"

    def forget_segments(self) -> None:
        """Drop all kept tokens, for measurements from a cold start."""
        if self._segments is not None:
            self._segments.clear()

    # what goes in

    def tokenize(self, prompt: Prompt) -> list[Tokens]:
        """Tokens of each prompt, as the engine will see them. Raises `NotExact`."""
        if isinstance(prompt, ChatPrompt):
            return [self.encode_chat(prompt)]
        if isinstance(prompt, TextPrompts):
            return [
                self._truncated(
                    self.encode_text(text, prompt.encoding.add_special_tokens), prompt.encoding
                )
                for text in prompt.texts
            ]
        return [self._truncated(token_array(tokens), prompt.encoding) for tokens in prompt.prompts]

    def encode_chat(self, prompt: ChatPrompt) -> Tokens:
        """Tokens of a conversation, uint32. Raises `NotExact`."""
        return self.encode_rendered(self.render(prompt), prompt.encoding)

    def encode_rendered(self, text: str, encoding: Encoding) -> Tokens:
        """Tokens of a rendered conversation, uint32."""
        return self._truncated(self.encode_text(text, encoding.add_special_tokens), encoding)

    def encode_text(self, text: str, add_special_tokens: bool) -> Tokens:
        """Tokens of plain text, uint32. Raises `NotExact` for text that is no Unicode, or that the
        engine will refuse for its length alone, by the same rule."""
        if self._most_characters is not None and len(text) > self._most_characters:
            raise TooCostly(f"{len(text)} characters are more than the model's context can hold")
        if add_special_tokens or self._segments is None:
            return self._encode(text, add_special_tokens)
        return self._segments.tokens(self._segments.pieces(text))

    def uncached(self, text: str) -> int:
        """Characters of ``text`` whose tokens are not cached: what `encode_text` will cost."""
        if self._segments is None:
            return len(text)
        return self._segments.missing(self._segments.pieces(text))

    def _encode_plain(self, text: str) -> Tokens:
        return self._encode(text, False)

    def _encode_stretches(self, texts: list[str]) -> list[Tokens]:
        try:
            # Without offsets, which nobody reads: a fifth faster than one by one.
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # lone surrogates; the library raises plain Exception
            raise NotExact(f"the text cannot be tokenized: {error}") from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    def _encode(self, text: str, add_special_tokens: bool) -> Tokens:
        try:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # lone surrogates; the library raises plain Exception
            raise NotExact(f"the text cannot be tokenized: {error}") from error
        return np.array(encoding.ids, dtype=np.uint32)

    def _truncated(self, tokens: Tokens, encoding: Encoding) -> Tokens:
        limit = encoding.truncate_prompt_tokens
        if limit is None:
            return tokens
        if self._max_model_len and len(tokens) >= self._max_model_len:
            raise NotExact("the engine truncates a prompt longer than the model's context")
        if limit < 0:
            if not self._max_model_len:
                raise NotExact("how long a prompt the engine keeps is not known")
            return tokens
        if limit >= len(tokens):
            return tokens
        if encoding.add_special_tokens and encoding.truncation_side is None:
            raise NotExact("the engine's tokenizer truncates around the special tokens")
        if limit == 0:
            return tokens[:0]
        # vLLM sets its tokenizers to the left for models that generate.
        return tokens[:limit] if encoding.truncation_side == "right" else tokens[-limit:]

    # chats

    def template(self, prompt: ChatPrompt) -> ChatTemplate:
        """The template that applies: `tool_use` for tools where there is one. Or `NotExact`."""
        if self.template_disabled:
            raise NotExact(self.template_disabled)
        named = self._templates
        tools = prompt.tools is not None and not self._excludes_tools(prompt)
        found = named.get("tool_use") if tools else None
        found = found or named.get("default")
        if found is None:
            raise NotExact(self._no_template)
        return found

    def _excludes_tools(self, prompt: ChatPrompt) -> bool:
        return prompt.tool_choice_none and self._tools_excluded_when_none

    def render(self, prompt: ChatPrompt) -> str:
        """The conversation as one text. Raises `NotExact`."""
        template = self.template(prompt)
        if not prompt.messages:
            raise NotExact("the engine refuses an empty conversation")
        content_format = template.content_format
        if self._content_format == "string":
            content_format = "string"
        elif self._content_format == "openai":
            content_format = "openai"
        messages = conversation(prompt.messages, content_format)
        if not template.knows_developer and any(m["role"] == "developer" for m in messages):
            messages = developer_to_system(messages)
        arguments = template_arguments(prompt, self._template_defaults)
        generates = arguments.pop("add_generation_prompt", False)
        continues = arguments.pop("continue_final_message", False)
        documents = arguments.pop("documents", None)
        if documents is not None and not all(isinstance(one, dict) for one in documents):
            raise NotExact("documents are not objects")
        final = None
        if continues:
            if generates:
                raise NotExact("add_generation_prompt must be false to continue a message")
            messages, final = _marked(messages, template)
        text = template.render(
            {
                **self._special_tokens,
                **{key: value for key, value in arguments.items() if key in template.variables},
                "messages": messages,
                "tools": None if self._excludes_tools(prompt) else tool_dicts(prompt.tools),
                "documents": documents,
                "add_generation_prompt": generates,
            }
        )
        return text if final is None else _continued(text, final)


def token_array(tokens: Sequence[int]) -> Tokens:
    """Client-given token ids as uint32. Raises `NotExact` for ids no vocabulary can have."""
    if tokens and max(tokens) > _HIGHEST_TOKEN:
        raise NotExact("a token id is out of any vocabulary")
    return np.array(tokens, dtype=np.uint32)


def tokenize_ids(prompt: TokenPrompts) -> list[Tokens]:
    """Prompts that came as tokens need no tokenizer, unless the engine truncates them."""
    if prompt.encoding.truncate_prompt_tokens is not None:
        raise NotExact("the engine truncates the given tokens")
    return [token_array(tokens) for tokens in prompt.prompts]


def _marked(
    messages: list[dict[str, Any]], template: ChatTemplate
) -> tuple[list[dict[str, Any]], str]:
    """The messages with a mark after the text to continue, and that text."""
    messages = copy.deepcopy(messages)
    last = messages[-1]
    content = last.get("content")
    if content is None or "content" not in template.source:
        raise NotExact("there is no final message to continue")
    if isinstance(content, list):
        for part in reversed(content):
            if "text" in part:
                text = str(part["text"])
                part["text"] = text + _CONTINUE_MARK
                return messages, text
        raise NotExact("there is no text to continue in the final message")
    last["content"] = content + _CONTINUE_MARK
    return messages, str(content)


def _continued(text: str, final: str) -> str:
    """The text up to the mark; trailing blanks go where the template trimmed the mark's own."""
    mark = _CONTINUE_MARK.strip()
    if final.strip() not in text or mark not in text:
        raise NotExact("the chat template changes the final message")
    place = text.rindex(mark)
    if text.startswith(_CONTINUE_MARK, place):
        return text[:place]
    return text[:place].rstrip()


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    content = files.get(name)
    if content is None:
        return {}
    try:
        value = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise NotExact(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise NotExact(f"{name} is not a JSON object")
    return value


def _json_setting(settings: Mapping[str, str], name: str) -> dict[str, Any]:
    text = settings.get(name)
    if not text:
        return {}
    return _object({name: text.encode()}, name)


def _is_rebuilt_form(definition: Mapping[str, Any]) -> bool:
    """Whether the file already states the steps that the rebuilt class would take."""
    step = definition.get("pre_tokenizer") or {}
    return step.get("type") == "Metaspace" and definition.get("normalizer") is None


def _named_tokens(
    config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]
) -> dict[str, AddedToken]:
    """bos, eos, … and a model's own `*_token`s: templates see them, and they are never split."""
    merged = dict(config)
    if "added_tokens_decoder" not in config:
        merged |= special_tokens_map
    found: dict[str, AddedToken] = {}
    for name, value in merged.items():
        if not name.endswith("_token") or name in ("add_bos_token", "add_eos_token"):
            continue
        if isinstance(value, str):
            found[name] = AddedToken(value, special=True, normalized=False)
        elif isinstance(value, dict) and isinstance(value.get("content"), str):
            found[name] = _added_token(value, special=True)
    order = {name: index for index, name in enumerate(_NAMED_TOKENS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _added_token(fields: Mapping[str, Any], *, special: bool) -> AddedToken:
    flags = {name: bool(fields[name]) for name in _FLAGS if name in fields}
    return AddedToken(fields["content"], **({"special": special} | flags))


def _add_missing_tokens(
    backend: Backend, config: Mapping[str, Any], named: Mapping[str, AddedToken]
) -> None:
    """Tokens that only the configuration declares; transformers adds them when it loads."""
    present = {str(token): repr(token) for token in backend.get_added_tokens_decoder().values()}
    wanted: list[AddedToken] = []
    declared = config.get("added_tokens_decoder") or {}
    for _, fields in sorted(declared.items(), key=lambda item: int(item[0])):
        token = _added_token(fields, special=False)
        if present.get(token.content) != repr(token):
            wanted.append(token)
    known = set(present) | {token.content for token in wanted}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = extra.values() if isinstance(extra, dict) else extra
    for token in (*named.values(), *(_extra_token(value) for value in values)):
        if token.content not in known:
            known.add(token.content)
            wanted.append(token)
    if wanted:
        backend.add_tokens(wanted)


def _extra_token(value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return _added_token(value, special=True)
    raise NotExact("tokenizer_config.json lists a special token that is neither text nor a token")


def _added_tokens(backend: Backend) -> list[dict[str, Any]]:
    return [
        {"id": number, "content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}
        for number, token in backend.get_added_tokens_decoder().items()
    ]


def _templates(
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    settings: Mapping[str, str],
    missing: str,
) -> tuple[dict[str, ChatTemplate], str]:
    """Name → template, and the reason when there is no default."""
    sources = _template_sources(files, config, settings)
    compiled: dict[str, ChatTemplate] = {}
    for name, source in sources.items():
        try:
            compiled[name] = ChatTemplate(source)
        except NotExact as error:
            missing = error.reason
    return compiled, missing


def _template_sources(
    files: Mapping[str, bytes], config: Mapping[str, Any], settings: Mapping[str, str]
) -> dict[str, str]:
    """A flag beats a file beats the configuration, as in vLLM and transformers."""
    given = settings.get("chat_template")
    if given and given in files:
        return {"default": _text(files, given)}
    if given and any(mark in given for mark in "{}\n"):
        return {"default": given}
    sources: dict[str, str] = {}
    if "chat_template.jinja" in files:
        sources["default"] = _text(files, "chat_template.jinja")
    folder = "additional_chat_templates/"
    for name in files:
        if name.startswith(folder) and name.endswith(".jinja"):
            sources[name.removeprefix(folder).removesuffix(".jinja")] = _text(files, name)
    if not sources:
        declared = config.get("chat_template")
        if isinstance(declared, str):
            sources["default"] = declared
        elif isinstance(declared, list):
            for entry in declared:
                sources[str(entry["name"])] = str(entry["template"])
        elif isinstance(declared, dict):
            sources = {str(name): str(source) for name, source in declared.items()}
    if given:  # the name of one of the model's templates
        if given not in sources:
            raise NotExact(f"the engine's chat template {given} is not among the served files")
        return {"default": sources[given]}
    return sources


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise NotExact(f"{name} is not UTF-8: {error}") from error


def _probes(added: list[str]) -> list[str]:
    """Texts for the self-test: every added token between stretches that like to stick together."""
    stretches = [
        "Hello world",
        " leading and trailing ",
        "\n\n",
        "it's 12345,6789…",
        "e\u0301\u0301 ﬁ Ａ",
        "\u0301combining first",
        "漢字かな交じり文。",
        "👩‍👩‍👧 \U0001f600\u200d",
        "   \t x\r\n",
        "def f(x):\n    return x ** 2\n",
        "don't'VE I'LL",
        "",
        " ",
        "ß İ ſ ǆ",
    ]
    edge = added[:40] + added[-10:]
    probes = []
    for index, token in enumerate(edge):
        left = stretches[index % len(stretches)]
        right = stretches[(index * 5 + 3) % len(stretches)]
        probes.append(f"{left}{token}{right}{token}{left}")
    probes.append("".join(f"{text}{added[i % len(added)]}" for i, text in enumerate(stretches)))
    cut = "".join(token[: max(1, len(token) // 2)] + token + token[1:] for token in edge[:12])
    probes.append(cut)  # halves of added tokens next to whole ones
    return probes
