"""Bodies of /v1/responses: enough of that API for clients that hold their own history.

Nothing is stored, so `previous_response_id` and `background` are refused.
"""

from typing import Any

import msgspec

from dynamo_workers.sim.completions import Envelope
from dynamo_workers.sim.errors import RequestError
from dynamo_workers.sim.generation import Generation


def chat_body(body: dict[str, Any]) -> dict[str, Any]:
    """The chat request that a request to this API means."""
    for name in ("previous_response_id", "background", "prompt", "conversation"):
        if body.get(name) not in (None, False):
            raise RequestError(f"The simulated engine does not support {name}.", param=name)
    given = body.get("input")
    messages: list[Any] = []
    instructions = body.get("instructions")
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    elif isinstance(given, list):
        for item in given:
            if not isinstance(item, dict) or item.get("type", "message") != "message":
                raise RequestError("input may hold messages only.", param="input")
            messages.append({"role": item.get("role"), "content": item.get("content")})
    else:
        raise RequestError("input must be a string or a list of messages.", param="input")
    chat = {name: value for name, value in body.items() if name not in ("tools", "tool_choice")}
    if body.get("tools"):
        raise RequestError("The simulated engine calls no tools.", param="tools")
    return {**chat, "messages": messages}


class Responses:
    """The `response` object and the events of its stream."""

    def __init__(self, envelope: Envelope, body: dict[str, Any]) -> None:
        self._envelope = envelope
        self._body = body
        self._message_id = "msg_" + envelope.id.removeprefix("resp_")
        self._number = 0

    def whole(self, generation: Generation) -> dict[str, Any]:
        answer = generation.answers[0]
        cut = answer.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        sequence = generation.sequences[0]
        result = self._response(status, [self._message("".join(answer.pieces), "completed")])
        result["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        result["usage"] = {
            "input_tokens": len(sequence.prompt),
            "input_tokens_details": {"cached_tokens": generation.cached_tokens},
            "output_tokens": sequence.produced,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sequence.length,
        }
        return result

    def begin(self, _generation: Generation) -> list[bytes]:
        started = self._response("in_progress", [])
        where = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        return [
            self._event("response.created", response=started)
            + self._event("response.in_progress", response=started)
            + self._event(
                "response.output_item.added",
                output_index=0,
                item=self._message(None, "in_progress"),
            )
            + self._event("response.content_part.added", **where, part=_part(""))
        ]

    def tokens(self, generation: Generation, index: int, first: int, end: int) -> bytes:
        return self._event(
            "response.output_text.delta",
            item_id=self._message_id,
            output_index=0,
            content_index=0,
            delta="".join(generation.answers[index].pieces[first:end]),
            logprobs=[],
        )

    def end(self, generation: Generation) -> bytes:
        text = "".join(generation.answers[0].pieces)
        where = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        final = self.whole(generation)
        return (
            self._event("response.output_text.done", **where, text=text, logprobs=[])
            + self._event("response.content_part.done", **where, part=_part(text))
            + self._event(
                "response.output_item.done",
                output_index=0,
                item=self._message(text, "completed"),
            )
            + self._event(f"response.{final['status']}", response=final)
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else [_part(text)],
        }

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._envelope.id,
            "object": "response",
            "created_at": self._envelope.created,
            "model": self._envelope.model,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata"),
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "temperature": body.get("temperature", 1.0),
            "tool_choice": "none",
            "tools": [],
            "top_p": body.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": None,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
