"""Stock vLLM servers on CPU, behind a real Gateway with our picker.

The pods are those of `examples/vllm-stock.yaml`, with the engine's packages mounted from this
machine where the full image has them. Nothing of ours is in them: the picker learns their models,
tokens and caches from what vLLM says to everybody.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from dynamo_runtime import __version__

from e2e.cluster import Cluster
from e2e.cluster.fixtures import Gateway
from e2e.gateway import pools
from e2e.gateway.space import Space
from e2e.gateway.traffic import ask

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm-stock.yaml"
POOL, START_S = "vllm", 600.0
PACKAGES = "lib/python3.11/site-packages"
IMAGE = f"dynamo-platform/vllm:{__version__}"
EVENTS = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "endpoint": "tcp://*:5557",
    "replay_endpoint": "tcp://*:5558",
}


def engines(name: str, packages: Path, replicas: int, adapter: str = "") -> dict[str, Any]:
    """The example's workers as a plain Deployment, with an adapter if one is named."""
    whole = yaml.safe_load(EXAMPLE.read_text())
    pod = whole["spec"]["components"][1]["podTemplate"]["spec"]
    (main,) = pod.pop("containers")
    main["image"] = pod["initContainers"][0]["image"] = IMAGE
    main["command"] = ["/opt/vllm/bin/python", *main["command"][1:]]
    main["args"] = ["--host", "0.0.0.0", *main["args"][2:-1], json.dumps(EVENTS)]
    if adapter:
        pod["initContainers"][0]["command"] += ["--adapter", adapter]
        main["args"] += ["--enable-lora", "--max-lora-rank", "8"]
        main["args"] += ["--lora-modules", f"{adapter}=/models/tiny-{adapter}"]
    main["env"] += [{"name": "VLLM_CPU_CI_ENV", "value": "1"}, {"name": "HOME", "value": "/tmp"}]
    main["readinessProbe"] = {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 2}
    main["resources"] = {"requests": {"cpu": "100m", "memory": "256Mi"}}
    main["volumeMounts"].append(
        {"name": "engine", "mountPath": f"/opt/vllm/{PACKAGES}", "readOnly": True}
    )
    volume = {"path": str(packages), "type": "Directory"}
    pod["volumes"].append({"name": "engine", "hostPath": volume})
    return pools.deployment(name, main, replicas, app=POOL, **pod)


@pytest.fixture
def packages(vllm_python: str) -> Path:
    """Where the engine's packages are on this machine."""
    found = Path(vllm_python).parents[1] / PACKAGES
    if not found.is_dir():
        pytest.skip(f"the images have Python 3.11, and there is no {found}")
    return found


def talk(topic: str, *said: str, model: str = "tiny") -> dict[str, Any]:
    """A chat request: a long first message, and what was said after it in turn."""
    roles = ("user", "assistant")
    turns = (f"{topic}: tell me of the cache. " * 30, *said)
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"model": model, "messages": messages, "max_tokens": 8}


@pytest.mark.long
@pytest.mark.timeout(START_S + 600)
async def test_conversations_go_exactly_where_their_prefix_is(
    pods: Cluster, gateway: Gateway, namespace: str, packages: Path
) -> None:
    space = Space(pods, namespace)
    space.start(
        engines(POOL, packages, 2),
        *pools.pool(POOL),
        *pools.behind(gateway, POOL, namespace),
        deployments=(POOL, f"{POOL}-epp"),
        timeout=START_S,
    )

    async with aiohttp.ClientSession(
        f"http://{gateway.address}", headers={"host": pools.hostname(namespace)}
    ) as client:

        async def chat(topic: int, *said: str) -> tuple[str, dict[str, Any]]:
            """The answer, and the decision by which it came."""
            body = talk(str(topic), *said)
            status, _, text = await ask(client, body, "/v1/chat/completions")
            assert status == 200, text
            (choice,) = json.loads(text)["choices"]
            return choice["message"]["content"], space.decisions(f"{POOL}-epp")[0]

        firsts = [await chat(topic) for topic in range(6)]
        assert {decision["how"] for _, decision in firsts} == {"exact"}
        workers = [decision["worker"] for _, decision in firsts]
        assert len(set(workers)) == 2, "both engines get some"
        for topic, ((answer, _), worker) in enumerate(zip(firsts, workers, strict=True)):
            _, decision = await chat(topic, answer, "And what then?")
            assert (decision["how"], decision["worker"]) == ("exact", worker)
            assert decision["overlap_blocks"] >= 2


@pytest.mark.long
@pytest.mark.timeout(START_S + 600)
async def test_an_adapter_is_asked_of_the_engine_that_has_it(
    pods: Cluster, gateway: Gateway, namespace: str, packages: Path
) -> None:
    """And its prefixes are its own: the base model's don't count for it."""
    space = Space(pods, namespace)
    poets = f"{POOL}-poet"
    space.start(
        engines(POOL, packages, 1),
        engines(poets, packages, 1, adapter="poet"),
        *pools.pool(POOL),
        *pools.behind(gateway, POOL, namespace),
        deployments=(POOL, poets, f"{POOL}-epp"),
        timeout=START_S,
    )
    (poet,) = (name for name in space.pods(POOL) if name.startswith(f"{poets}-"))
    async with aiohttp.ClientSession(
        f"http://{gateway.address}", headers={"host": pools.hostname(namespace)}
    ) as client:

        async def chat(topic: str, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
            body = talk(topic, model=model)
            status, _, text = await ask(client, body, "/v1/chat/completions")
            assert status == 200, text
            return json.loads(text), space.decisions(f"{POOL}-epp")[0]

        for topic in ("sea", "sky", "sand"):
            for turn in range(2):
                answer, decision = await chat(topic, "poet")
                assert answer["model"] == "poet"
                assert (decision["how"], decision["worker"]) == ("exact", poet)
                assert (decision["overlap_blocks"] >= 2) == (turn == 1)
            # The same words for the base model: nobody has them.
            _, decision = await chat(topic, "tiny")
            assert decision["how"] == "exact"
            assert decision["overlap_blocks"] == 0
        status, _, text = await ask(client, talk("x", model="poe"), "/v1/chat/completions")
        assert status == 404, text
