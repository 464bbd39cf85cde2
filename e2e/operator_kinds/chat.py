"""What clients and the picker say of one chat."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

import openai

from e2e.operator.space import Space

Json = dict[str, Any]

ANSWER_S = 60.0
"""For a connection, and between parts of an answer, while this machine does much else."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer and the decision that it came by."""

    text: str
    how: str
    """"exact", "approximate" or "load-only"."""
    worker: str
    """Name of the pod that was chosen."""
    overlap_blocks: int
    """Blocks of the prompt that this worker had."""


def chat(space: Space, graph: str, model: str, *said: str, max_tokens: int = 8) -> Answer:
    """One request to a graph's frontend, streamed. `said`: what user and assistant said in turn,
    the user first and last."""
    roles = ("user", "assistant")
    url = f"{space.url(graph)}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=ANSWER_S) as client:
        stream = client.chat.completions.create(
            model=model,
            messages=[  # type: ignore[arg-type]
                {"role": roles[turn % 2], "content": content} for turn, content in enumerate(said)
            ],
            max_tokens=max_tokens,
            stream=True,
        )
        chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert chunks[-1].finish_reason in ("length", "stop")
    text = "".join(chunk.delta.content or "" for chunk in chunks)
    newest = decisions(space, graph)[0]
    chosen = newest["candidates"][0]
    return Answer(text, newest["how"], chosen["name"], chosen["overlap_blocks"])


def decisions(space: Space, graph: str) -> list[Json]:
    """What the graph's picker decided, the newest first."""
    (pod,) = space.pods(graph, "Frontend")
    url = f"http://{pod['status']['podIP']}:9090/debug/decisions"
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        found: list[Json] = json.load(answer)["decisions"]
    return found
