"""What a request asks the model to read, before any tokenizer has seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Kind(Enum):
    """The API that a request speaks."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RESPONSE = "response"
    OTHER = "other"
    """Not known here; such requests go by load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How text becomes tokens: what vLLM calls the tokenize parameters of a request."""

    add_special_tokens: bool
    truncate_prompt_tokens: int | None = None
    """Tokens to keep; -1 = what fits the model; None = no truncation."""
    truncation_side: str | None = None
    """`left` keeps the last tokens, `right` the first, None = the engine's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation for the model's chat template, as the client sent it."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None
    tool_choice_none: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    documents: Sequence[Mapping[str, Any]] | None = None
    reasoning_effort: str | None = None
    encoding: Encoding = Encoding(add_special_tokens=False)
    body_bytes: int = 0
    """Size of the request that it came in: bounds what rendering can cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompts:
    """One or several texts; each is a prompt of its own."""

    texts: Sequence[str]
    encoding: Encoding = Encoding(add_special_tokens=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompts:
    """Prompts that the client tokenized."""

    prompts: Sequence[Sequence[int]]
    encoding: Encoding = Encoding(add_special_tokens=True)


Prompt = ChatPrompt | TextPrompts | TokenPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """Everything that routing needs to know of a request."""

    kind: Kind
    model: str
    """The served model or LoRA adapter that the client named."""
    stream: bool = False
    prompt: Prompt | None = None
    """None where its tokens cannot be known here; `not_tokenizable` says why."""
    not_tokenizable: str = ""
    multimodal: bool = False
    """It carries images, audio or video."""
    untrusted_template: bool = False
    """It brings its own chat template, which is never executed here."""
    cache_salt: str = ""
    max_tokens: int | None = None
    n: int = 1
    has_kv_transfer_params: bool = False
    body_bytes: int = 0

    @property
    def splittable(self) -> bool:
        """Whether one engine can compute the prompt and another one the answer.

        That takes one prompt, one answer, and an API that knows transfer parameters (vLLM's chat
        and completions).
        """
        if self.kind not in (Kind.CHAT, Kind.COMPLETION) or self.n != 1:
            return False
        match self.prompt:
            case None:
                return self.kind is Kind.CHAT
            case TextPrompts(texts=texts):
                return len(texts) == 1
            case TokenPrompts(prompts=prompts):
                return len(prompts) == 1
        return True

    @property
    def lora(self) -> str:
        """The adapter that the request runs under, if its model is one: vLLM has one name space."""
        return self.model
