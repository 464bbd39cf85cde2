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


def engines(packages: Path, replicas: int) -> dict[str, Any]:
    """The example's workers as a plain Deployment."""
    whole = yaml.safe_load(EXAMPLE.read_text())
    pod = whole["spec"]["components"][1]["podTemplate"]["spec"]
    (main,) = pod.pop("containers")
    main["image"] = pod["initContainers"][0]["image"] = IMAGE
    main["command"] = ["/opt/vllm/bin/python", *main["command"][1:]]
    main["args"] = ["--host", "0.0.0.0", *main["args"][2:-1], json.dumps(EVENTS)]
    main["env"] += [{"name": "VLLM_CPU_CI_ENV", "value": "1"}, {"name": "HOME", "value": "/tmp"}]
    main["readinessProbe"] = {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 2}
    main["resources"] = {"requests": {"cpu": "100m", "memory": "256Mi"}}
    main["volumeMounts"].append(
        {"name": "engine", "mountPath": f"/opt/vllm/{PACKAGES}", "readOnly": True}
    )
    volume = {"path": str(packages), "type": "Directory"}
    pod["volumes"].append({"name": "engine", "hostPath": volume})
    return pools.deployment(POOL, main, replicas, **pod)


@pytest.mark.long
@pytest.mark.timeout(START_S + 600)
async def test_conversations_go_exactly_where_their_prefix_is(
    pods: Cluster, gateway: Gateway, namespace: str, vllm_python: str
) -> None:
    packages = Path(vllm_python).parents[1] / PACKAGES
    if not packages.is_dir():
        pytest.skip(f"the images have Python 3.11, and there is no {packages}")
    space = Space(pods, namespace)
    space.start(
        engines(packages, 2),
        *pools.pool(POOL),
        *pools.behind(gateway, POOL, namespace),
        deployments=(POOL, f"{POOL}-epp"),
        timeout=START_S,
    )

    async with aiohttp.ClientSession(
        f"http://{gateway.address}", headers={"host": pools.hostname(namespace)}
    ) as client:

        async def chat(*said: str) -> tuple[str, dict[str, Any]]:
            """The answer, and the decision by which it came."""
            roles = ("user", "assistant")
            messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
            body = {"model": "tiny", "messages": messages, "max_tokens": 8}
            status, _, text = await ask(client, body, "/v1/chat/completions")
            assert status == 200, text
            (choice,) = json.loads(text)["choices"]
            return choice["message"]["content"], space.decisions(f"{POOL}-epp")[0]

        talks = [f"{number}: tell me of the cache. " * 30 for number in range(6)]
        firsts = [await chat(talk) for talk in talks]
        assert {decision["how"] for _, decision in firsts} == {"exact"}
        workers = [decision["worker"] for _, decision in firsts]
        assert len(set(workers)) == 2, "both engines get some"
        for talk, (answer, _), worker in zip(talks, firsts, workers, strict=True):
            _, decision = await chat(talk, answer, "And what then?")
            assert (decision["how"], decision["worker"]) == ("exact", worker)
            assert decision["overlap_blocks"] >= 2
