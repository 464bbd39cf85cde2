"""Asking an engine for the tokens: for pods that serve no tokenizer files.

Every vLLM has `POST /tokenize`, which renders and tokenizes as its chat API does. It costs a round
trip and the engine's time, so it comes second to the files.
"""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec
import numpy as np

from dynamo_epp.requests import ChatPrompt, Encoding, Prompt, TokenPrompts
from dynamo_epp.tokenize.exact import NotExact
from dynamo_epp.tokenize.segments import Tokens
from dynamo_epp.tokenize.tokenizer import tokenize_ids


class _Answer(msgspec.Struct):
    tokens: list[int]


_answers = msgspec.json.Decoder(_Answer)


class RemoteTokenizer:
    """Tokens from the engine at ``url`` (`http://ip:port`), through a session the caller owns.

    ``model`` is the name to ask under; empty means the engine's own. ``timeout_s`` bounds one call.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        model: str = "",
        timeout_s: float = 2.0,
        tools_excluded_when_none: bool = False,
    ) -> None:
        self._session = session
        self._url = f"{url.rstrip('/')}/tokenize"
        self._model = model
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._tools_excluded_when_none = tools_excluded_when_none

    async def tokenize(self, prompt: Prompt) -> list[Tokens]:
        """Tokens of each prompt, uint32. Raises `NotExact` if the engine does not say."""
        if isinstance(prompt, TokenPrompts):
            return tokenize_ids(prompt)
        if isinstance(prompt, ChatPrompt):
            return [await self._ask(self._chat(prompt), prompt.encoding)]
        encoding = prompt.encoding
        return [await self._ask({"prompt": text}, encoding) for text in prompt.texts]

    def _chat(self, prompt: ChatPrompt) -> dict[str, Any]:
        kwargs = dict(prompt.chat_template_kwargs)
        if prompt.documents is not None:
            kwargs["documents"] = prompt.documents
        if prompt.reasoning_effort is not None:
            kwargs.setdefault("enable_thinking", prompt.reasoning_effort != "none")
            kwargs["reasoning_effort"] = prompt.reasoning_effort
        body: dict[str, Any] = {
            "messages": [_older_name(message) for message in prompt.messages],
            "add_generation_prompt": prompt.add_generation_prompt,
            "continue_final_message": prompt.continue_final_message,
            "chat_template_kwargs": kwargs,
        }
        if prompt.continue_final_message and prompt.add_generation_prompt:
            raise NotExact("add_generation_prompt must be false to continue a message")
        excluded = prompt.tool_choice_none and self._tools_excluded_when_none
        if prompt.tools is not None and not excluded:
            body["tools"] = prompt.tools
        return body

    async def _ask(self, body: dict[str, Any], encoding: Encoding) -> Tokens:
        if encoding.truncate_prompt_tokens is not None:
            raise NotExact("the engine's /tokenize does not truncate")
        body["add_special_tokens"] = encoding.add_special_tokens
        if self._model:
            body["model"] = self._model
        try:
            async with self._session.post(
                self._url,
                data=msgspec.json.encode(body),
                headers={"content-type": "application/json"},
                timeout=self._timeout,
            ) as response:
                content = await response.read()
                if response.status != 200:
                    raise NotExact(f"{self._url} answered {response.status}: {content[:200]!r}")
            return np.array(_answers.decode(content).tokens, dtype=np.uint32)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise NotExact(f"{self._url} cannot be asked: {reason}") from error
        except (msgspec.MsgspecError, UnicodeError, OverflowError, RecursionError) as error:
            raise NotExact(f"{self._url} cannot be understood: {error}") from error


def _older_name(message: dict[str, Any]) -> dict[str, Any]:
    """The chat API renames `reasoning_content`; /tokenize does not."""
    if message.get("reasoning_content") is None or message.get("reasoning") is not None:
        return message
    return {**message, "reasoning": message["reasoning_content"]}
