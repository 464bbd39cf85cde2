"""The first thing that anybody does: apply the example, chat, delete it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import openai
import pytest

from e2e.operator.space import Json, Space

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "quickstart.yaml"
NAME = "quickstart"


def everything(space: Space) -> set[str]:
    """All objects of the namespace, of whatever kind, but Events."""
    kinds = space.cluster.kubectl(
        "api-resources", "--namespaced", "--verbs=list,get", "-o", "name"
    ).stdout.split()
    kinds = [kind for kind in kinds if not kind.startswith("events") and ".metrics" not in kind]
    found = space.kubectl("get", ",".join(kinds), "-o", "name")
    return {name for name in found.split() if "lease" not in name}


def decisions(space: Space) -> list[Json]:
    """What the frontend's picker decided, the newest first."""
    (pod,) = space.pods(NAME, "Frontend")
    url = space.pod_url(pod, 9090)
    with urllib.request.urlopen(f"{url}/debug/decisions", timeout=10.0) as answer:
        found: list[Json] = json.load(answer)["decisions"]
    return found


@pytest.mark.timeout(300)
def test_quickstart_serves_and_leaves_nothing(installed_space: Space) -> None:
    space = installed_space
    before = everything(space)
    applied = space.cluster.kubectl("-n", space.name, "apply", "-f", str(EXAMPLE))
    assert "Warning" not in applied.stderr
    space.wait_ready(NAME)
    columns = space.columns(NAME)
    assert (columns["READY"], columns["STATE"]) == ("True", "successful")
    assert all(pod["status"]["phase"] == "Running" for pod in space.pods(NAME))
    assert len(space.pods(NAME, "Worker")) == 4

    client = openai.OpenAI(base_url=f"{space.url(NAME)}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    chat: list[Json] = []
    workers = []
    for turn in range(3):
        chat.append({"role": "user", "content": f"turn {turn}: " + "tell me of the cache " * 20})
        stream = client.chat.completions.create(
            model="tiny",
            messages=chat,
            max_tokens=24,
            stream=True,  # type: ignore[arg-type]
        )
        chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
        assert chunks[-1].finish_reason == "length"
        chat.append(
            {"role": "assistant", "content": "".join(c.delta.content or "" for c in chunks)}
        )
        newest = decisions(space)[0]
        chosen = newest["candidates"][0]
        workers.append(chosen["name"])
        assert newest["how"] == "exact"
        assert bool(chosen["overlap_blocks"]) == bool(turn), "what was said before is cached"
    whole = client.chat.completions.create(model="tiny", messages=chat, max_tokens=4)  # type: ignore[arg-type]
    assert whole.choices[0].message.content
    assert len(set(workers)) == 1
    client.close()

    space.cluster.kubectl("-n", space.name, "delete", "-f", str(EXAMPLE))
    space.until(
        lambda: everything(space) == before, "nothing left", 90.0, lambda: str(everything(space))
    )
