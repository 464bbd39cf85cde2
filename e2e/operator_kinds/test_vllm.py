"""The real engine in pods: the vLLM example on a cluster, its environment mounted from the machine.

The image is the one of `images/vllm.Containerfile` without the engine's packages, which are six
gigabytes: they come in as a read-only volume at the place where the full image has them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import yaml

from e2e.operator.space import Json, Space, is_ready
from e2e.operator_kinds.chat import ANSWER_S, chat

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm-cpu.yaml"
GRAPH, MODEL = "vllm-cpu", "tiny"
START_S = 400.0
PACKAGES = "lib/python3.11/site-packages"
"""Of an environment made by the Python that the images have."""
MOST = 12000
"""Tokens of the longest answer that context and cache hold."""
TOLD_S = 40.0
"""So long the answer takes in which pods are told to end: the news has to get there meanwhile."""


@pytest.fixture(scope="module")
def packages(space: Space, vllm_python: str) -> Path:
    """The folder with the engine's packages on the node, which is this machine."""
    found = Path(vllm_python).parents[1] / PACKAGES
    if not found.is_dir():
        pytest.skip(f"the images have Python 3.11, and there is no {found}")
    return found


@pytest.fixture(scope="module")
def engines(space: Space, packages: Path) -> Iterator[Space]:
    """The namespace, and the example in it, ready."""
    space.apply(graph(packages))
    space.wait_ready(GRAPH, START_S)
    yield space
    space.kubectl("delete", "dgd", GRAPH, "--ignore-not-found")


def graph(packages: Path) -> Json:
    """The example with the engine's packages mounted into its workers."""
    whole: Json = yaml.safe_load(EXAMPLE.read_text())
    for component in whole["spec"]["components"]:
        pod = component["podTemplate"]["spec"]
        (main,) = pod["containers"]
        main["resources"] = {"requests": {"cpu": "100m", "memory": "256Mi"}}
        if component["type"] == "worker":
            volume = {"path": str(packages), "type": "Directory"}
            pod["volumes"].append({"name": "engine", "hostPath": volume})
            mount = {"name": "engine", "mountPath": f"/opt/vllm/{PACKAGES}", "readOnly": True}
            main["volumeMounts"].append(mount)
            context = main["args"].index("--max-model-len") + 1
            main["args"][context] = str(MOST + 1024)
    return whole


@pytest.mark.timeout(600)
def test_two_engines_serve_by_what_they_have_cached(engines: Space) -> None:
    workers = engines.pods(GRAPH, "Worker")
    assert len(workers) == 2
    assert all(map(is_ready, workers))
    said = ["Tell me of the cache. " * 30]
    first = chat(engines, GRAPH, MODEL, *said)
    assert (first.how, first.overlap_blocks) == ("exact", 0)
    said += [first.text, "And what then?"]
    second = chat(engines, GRAPH, MODEL, *said)
    assert (second.how, second.worker) == ("exact", first.worker)
    assert second.overlap_blocks >= 2
    other = chat(engines, GRAPH, MODEL, "Something else altogether. " * 30)
    assert other.how == "exact"


def answer(space: Space, tokens: int, on_chunk: Callable[[], object] = lambda: None) -> int:
    """Ask for so many tokens and stream them; how many came, by the engine's own count."""
    url = f"{space.url(GRAPH)}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=ANSWER_S) as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Go on and on."}],
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        counted = 0
        for chunk in stream:
            on_chunk()
            counted = chunk.usage.completion_tokens if chunk.usage else 0
        return counted


@pytest.mark.timeout(400)
def test_deleting_the_graph_lets_a_stream_finish(engines: Space) -> None:
    """Frontend and worker are told to end in the middle of an answer."""
    began = time.monotonic()
    speed = answer(engines, 256) / (time.monotonic() - began)
    long = max(1000, min(MOST, round(speed * TOLD_S)))
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(answer, engines, long, begun.set)
        assert begun.wait(ANSWER_S)
        engines.kubectl("delete", "dgd", GRAPH)
        engines.until(lambda: not engines.pods(GRAPH), "all pods told to end", 60.0)
        assert not client.done(), "the answer was over before"
        assert client.result(240.0) == long
    engines.until(lambda: not engines.pods(GRAPH, ending=True), "no pod left", 90.0)
