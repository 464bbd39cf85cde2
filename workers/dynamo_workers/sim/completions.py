"""Bodies of /v1/chat/completions and /v1/completions, whole and streamed, as vLLM writes them."""

from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from dynamo_workers.sim.generation import Generation
from dynamo_workers.sim.parameters import Parameters

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every body of one answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str
    details: bool


class Shape(Protocol):
    """How an answer is written."""

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def begin(self, generation: Generation) -> list[bytes]:
        """What is sent before the first token of each choice."""

    def tokens(self, generation: Generation, index: int, first: int, end: int) -> bytes:
        """The event for tokens `first` to before `end` of choice `index`."""

    def end(self, generation: Generation) -> bytes:
        """What is sent after the last token."""


def usage(generation: Generation, envelope: Envelope, *, streamed: bool) -> dict[str, Any]:
    """Tokens of all prompts and answers; the prompts' are counted once, whatever n is."""
    sequences = generation.sequences
    distinct = {id(sequence.prompt): len(sequence.prompt) for sequence in sequences}
    prompt = sum(distinct.values())
    completion = generation.produced
    result: dict[str, Any] = {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
    }
    if envelope.details:
        result["prompt_tokens_details"] = {"cached_tokens": generation.cached_tokens}
    elif not streamed:
        result["prompt_tokens_details"] = None
    return result


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class _Base:
    kind = ""

    def __init__(self, envelope: Envelope, parameters: Parameters) -> None:
        self._envelope = envelope
        self._parameters = parameters

    def _head(self, kind: str) -> dict[str, Any]:
        e = self._envelope
        return {"id": e.id, "object": kind, "created": e.created, "model": e.model}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head(self.kind), "choices": choices, **more})

    def _reasons(self, generation: Generation, index: int, end: int) -> dict[str, Any]:
        """Why the choice ends, if it does with its token before `end`."""
        answer = generation.answers[index]
        if end < len(answer.tokens):
            return {"finish_reason": None}
        return {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}

    def _ids(self, generation: Generation, index: int, first: int, end: int) -> list[int] | None:
        if not self._parameters.return_token_ids:
            return None
        return generation.answers[index].tokens[first:end]

    def _running_usage(self, generation: Generation, index: int, end: int) -> dict[str, Any]:
        if not self._parameters.continuous_usage:
            return {}
        prompt = len(generation.sequences[index].prompt)
        return {
            "usage": {
                "prompt_tokens": prompt,
                "total_tokens": prompt + end,
                "completion_tokens": end,
            }
        }

    def end(self, generation: Generation) -> bytes:
        if not self._parameters.include_usage:
            return DONE
        total = usage(generation, self._envelope, streamed=True)
        return self._chunk([], usage=total, system_fingerprint=self._envelope.fingerprint) + DONE

    def _tail(self) -> dict[str, Any]:
        return {
            "service_tier": None,
            "system_fingerprint": self._envelope.fingerprint,
        }


class Chat(_Base):
    """chat.completion and chat.completion.chunk."""

    kind = "chat.completion.chunk"

    def whole(self, generation: Generation) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": "".join(answer.pieces),
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "reasoning": None,
                },
                "logprobs": None,
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
                "token_ids": self._ids(generation, index, 0, len(answer.tokens)),
            }
            for index, answer in enumerate(generation.answers)
        ]
        return {
            **self._head("chat.completion"),
            "choices": choices,
            **self._tail(),
            "usage": usage(generation, self._envelope, streamed=False),
            "prompt_logprobs": None,
            "prompt_token_ids": generation.sequences[0].prompt
            if self._parameters.return_token_ids
            else None,
            "kv_transfer_params": generation.transfer_params,
        }

    def begin(self, generation: Generation) -> list[bytes]:
        ids = generation.sequences[0].prompt if self._parameters.return_token_ids else None
        return [
            self._chunk(
                [
                    {
                        "index": index,
                        "delta": {"role": "assistant", "content": ""},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                ],
                prompt_token_ids=ids,
                **self._running_usage(generation, index, 0),
            )
            for index in range(len(generation.sequences))
        ]

    def tokens(self, generation: Generation, index: int, first: int, end: int) -> bytes:
        choice = {
            "index": index,
            "delta": {"content": "".join(generation.answers[index].pieces[first:end])},
            "logprobs": None,
            **self._reasons(generation, index, end),
            "token_ids": self._ids(generation, index, first, end),
        }
        return self._chunk([choice], **self._running_usage(generation, index, end))


class Text(_Base):
    """text_completion; `echoes` are the prompts' texts where they are to be repeated."""

    kind = "text_completion"

    def __init__(
        self, envelope: Envelope, parameters: Parameters, echoes: list[str] | None
    ) -> None:
        super().__init__(envelope, parameters)
        self._echoes = echoes

    def whole(self, generation: Generation) -> dict[str, Any]:
        n = self._parameters.n
        choices = []
        for index, answer in enumerate(generation.answers):
            echo = "" if self._echoes is None else self._echoes[index // n]
            choices.append(
                {
                    "index": index,
                    "text": echo + "".join(answer.pieces),
                    "logprobs": None,
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                    "token_ids": self._ids(generation, index, 0, len(answer.tokens)),
                    "prompt_logprobs": None,
                    "prompt_token_ids": generation.sequences[index].prompt
                    if self._parameters.return_token_ids
                    else None,
                }
            )
        return {
            **self._head(self.kind),
            "choices": choices,
            **self._tail(),
            "usage": usage(generation, self._envelope, streamed=False),
            "kv_transfer_params": generation.transfer_params,
        }

    def begin(self, generation: Generation) -> list[bytes]:
        return [b""] * len(generation.sequences)

    def tokens(self, generation: Generation, index: int, first: int, end: int) -> bytes:
        wanted = self._parameters.return_token_ids and first == 0
        choice = {
            "index": index,
            "text": "".join(generation.answers[index].pieces[first:end]),
            "logprobs": None,
            **self._reasons(generation, index, end),
            "prompt_token_ids": generation.sequences[index].prompt if wanted else None,
            "token_ids": self._ids(generation, index, first, end),
        }
        return self._chunk([choice], **self._running_usage(generation, index, end))
