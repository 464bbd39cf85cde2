"""Another team's simulated engines, unmodified, behind a real Gateway with our picker.

llm-d's simulator of vLLM says its models, adapters, queue and cache as vLLM does. Its KV events it
brings to a listener that it dials, as vLLM does in llm-d's central mode. It numbers them from 1,
vLLM from 0: to the picker the first one is lost, so with a port for them or without, it follows
what was sent where, and decisions say so.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from e2e.cluster import Cluster, settings
from e2e.cluster.fixtures import Gateway
from e2e.gateway import pools
from e2e.gateway.space import START_S, Space, eventually, samples, until
from e2e.gateway.traffic import ask

POOL, MODEL, SERVED = "sims", "llm-d-sim", "x-inference-pod"
EVENTS_PORT, BLOCK_TOKENS = 5557, 16
ADAPTERS = {"sims-sql": "sql", "sims-chat": "chat"}
"""Deployment -> the adapter that its pods have."""
ASKED = 12
WORDS = " ".join(f"word{number}" for number in range(200))
CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
- type: lora-affinity-scorer
- type: max-score-picker
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
  - {pluginRef: lora-affinity-scorer, weight: 1}
  - {pluginRef: max-score-picker}
"""


def sims(name: str, adapter: str, replicas: int, *, events_as_maps: bool = False) -> dict[str, Any]:
    """A Deployment of the simulator as its own manifests have it, with one adapter. Events are
    positional, as those of older vLLM, or maps."""
    fields = {"POD_NAME": "metadata.name", "POD_NAMESPACE": "metadata.namespace"}
    fields["POD_IP"] = "status.podIP"
    lora = {"name": adapter, "path": f"/adapters/{adapter}", "base_model_name": MODEL}
    container = {
        "name": "vllm",
        "image": settings.LLM_D_SIM_IMAGE,
        "imagePullPolicy": "Never",
        "args": [
            *("--model", MODEL, "--force-dummy-tokenizer", "--port", "8000"),
            *("--enable-kvcache", "--lora-modules", json.dumps(lora), "--max-loras", "2"),
            *("--zmq-endpoint", f"tcp://{POOL}-epp:{EVENTS_PORT}", f"--block-size={BLOCK_TOKENS}"),
            *(["--use-vllm-map-event-format"] if events_as_maps else []),
        ],
        "env": [
            {"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for key, path in fields.items()
        ],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "20m", "memory": "32Mi"}},
    }
    return pools.deployment(name, container, replicas, app=POOL)


@pytest.fixture(params=["brought", "unheard"])
def events(request: pytest.FixtureRequest) -> bool:
    """Whether the picker has a port for the pods' KV events."""
    return bool(request.param == "brought")


@pytest.fixture
async def client(
    pods: Cluster, gateway: Gateway, namespace: str, events: bool
) -> AsyncIterator[aiohttp.ClientSession]:
    """Talks to the pool through the Gateway, and every pod of it has answered the picker."""
    pods.build_further("llm-d-sim")
    pods.load_further_images("llm-d-inference-sim")
    space = Space(pods, namespace)
    picker = pools.pool(POOL, 8000, "--config-text", CONFIG)
    if events:
        picker = pools.pool(
            *(POOL, 8000, "--config-text", CONFIG),
            *("--kv-events-bind", f"tcp://*:{EVENTS_PORT}"),
        )
        (service,) = (each for each in picker if each["kind"] == "Service")
        (grpc,) = service["spec"]["ports"]
        service["spec"]["ports"] = [
            {"name": "grpc", **grpc},
            {"name": "kv-events", "port": EVENTS_PORT},
        ]
    # The picker first: what pods say before it listens is lost.
    space.start(*picker, *pools.behind(gateway, POOL, namespace), deployments=(f"{POOL}-epp",))
    space.start(
        *(
            sims(name, adapter, 2, events_as_maps=adapter == "sql")
            for name, adapter in ADAPTERS.items()
        ),
        deployments=tuple(ADAPTERS),
    )
    async with aiohttp.ClientSession(
        f"http://{gateway.address}", headers={"host": pools.hostname(namespace)}
    ) as session:
        loop = asyncio.get_running_loop()

        def answers() -> bool:
            asking = ask(session, {"model": adapter, "prompt": "ready?", "max_tokens": 1})
            return asyncio.run_coroutine_threadsafe(asking, loop).result()[0] == 200

        for adapter in ADAPTERS.values():
            await until(answers, f"{adapter} is served")
        yield session


@pytest.mark.long
@pytest.mark.timeout(START_S + 900)
async def test_adapters_and_prefixes_find_their_pods(
    client: aiohttp.ClientSession, pods: Cluster, namespace: str, events: bool
) -> None:
    async def served(model: str, prompt: str) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": 4}
        status, headers, text = await ask(client, body)
        assert status == 200, text
        return headers[SERVED]

    def decision() -> dict[str, Any]:
        (newest, *_) = Space(pods, namespace).decisions(f"{POOL}-epp")
        found: dict[str, Any] = newest
        return found

    # An adapter's requests go where it is, and nowhere else.
    for name, adapter in ADAPTERS.items():
        found = {await served(adapter, f"{number} {adapter}") for number in range(ASKED)}
        assert all(pod.startswith(f"{name}-") for pod in found), found

    # Requests for the base model go to pods of both; those of one conversation to one pod.
    prompts = [f"conversation {number}: {WORDS}" for number in range(ASKED)]
    first = [await served(MODEL, prompt) for prompt in prompts]
    assert len(set(first)) > 1, Counter(first)
    again = [await served(MODEL, f"{prompt} and then?") for prompt in prompts]
    assert again == first
    last = decision()
    assert (last["how"], last["worker"]) == ("approximate", again[-1])
    if events:
        (picker,) = Space(pods, namespace).addresses(f"{POOL}-epp").values()

        async def heard(outcome: str) -> float:
            name = "dynamo_epp_kv_event_messages_total"
            return sum(
                one.value
                for one in await samples(picker)
                if one.name == name and one.labels["outcome"] == outcome
            )

        async def all_told() -> bool:
            """Each pod that was asked something long says so within a second."""
            return await heard("taken") >= len(set(first))

        await eventually(all_told, "the pods' events are heard")
        assert await heard("unknown-sender") == await heard("malformed") == 0

    # What nobody has is refused as what it is.
    status, _, text = await ask(client, {"model": "nobody", "prompt": "?", "max_tokens": 1})
    assert status == 404, text
