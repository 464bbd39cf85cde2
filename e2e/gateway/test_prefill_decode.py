"""Prompts that two workers of a graph share, behind a Gateway that is none of ours.

Picker, workers, pool, policies and the Secret are what the operator makes of a user's graph. What
was computed where is read off the engines' own counters, and what came of signatures off the
workers'.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from dynamo_operator.render import names
from dynamo_runtime.prefill_grant import PREFILLERS_HEADER, Grant

from e2e.cluster import Cluster
from e2e.gateway import envoy
from e2e.gateway.envoy import Backend
from e2e.gateway.prefill_decode import (
    CACHED,
    HTTP_PORT,
    NAME,
    POOL,
    TOKENS,
    TYPE,
    Graph,
    admits,
    long,
    long_ones_are_split,
    wanted,
)
from e2e.gateway.space import Space, eventually, until
from e2e.gateway.traffic import Traffic
from e2e.operator import graphs
from e2e.operator.operators import HostOperator
from e2e.operator.space import Json
from e2e.operator.space import Space as Objects

GATEWAY = "gateway"
SIDE_CHANNEL = 5600
KILL_ENGINE = "--kv-events-config"
WHILE_IT_WORKS = """
import json, urllib.request
while not json.load(urllib.request.urlopen("http://127.0.0.1:8000/load"))["server_load"]:
    pass
"""


@pytest.fixture(scope="module")
def graph(inference_pools: Cluster, with_crds: Cluster, module_namespace: str) -> Iterator[Graph]:
    """The graph, taken care of by an operator of this machine, and the gateway."""
    objects = Objects(with_crds, module_namespace)
    space = Space(with_crds, module_namespace)
    with HostOperator(objects):
        objects.apply(wanted())
        objects.until(lambda: objects.exists("inferencepool", POOL), "its pool")
        backend = Backend.of(with_crds, module_namespace, POOL)
        space.start(*envoy.manifests(GATEWAY, [backend]), deployments=(GATEWAY,))
        objects.wait_ready(NAME)
        found = Graph(space, objects, space.url(GATEWAY))
        asyncio.run(found.is_reached())
        yield found
        objects.kubectl("delete", "dgd", NAME, "--wait=false")


@pytest.mark.timeout(300)
async def test_long_prompts_are_split_and_cached_ones_are_not(graph: Graph) -> None:
    answers = await long_ones_are_split(graph)
    (decode,) = graph.addresses("decode").values()
    assert {each.headers[envoy.SERVED] for each in answers} == {f"{decode}:{HTTP_PORT}"}


@pytest.mark.timeout(300)
async def test_only_the_graphs_picker_makes_a_decode_worker_ask(graph: Graph) -> None:
    """Past the gateway, whatever pretends to be the picker's word is an ordinary request; what is
    signed with the content of the graph's Secret is followed, but not through the gateway."""
    uid = graph.objects.get("dgd", NAME)["metadata"]["uid"]
    data = graph.objects.get("secret", names.pairing_secret(NAME, uid))["data"]
    graphs_own = base64.b64decode(data["secret"])
    prefiller = f"{next(iter(graph.addresses('prefill').values()))}:{HTTP_PORT}"
    decode = f"http://{next(iter(graph.addresses('decode').values()))}:{HTTP_PORT}"
    now = int(time.time())

    def signed(expires: int = now + 60, secret: bytes = graphs_own) -> dict[str, str]:
        grant = Grant((prefiller,), "mine", expires, False, 0, (0,))
        return {**dict(grant.headers(secret)), "x-dynamo-booking": "mine"}

    forged = {
        "unsigned": {PREFILLERS_HEADER: prefiller},
        "signed by another": signed(secret=b"the secret of another graph"),
        "expired": signed(expires=now - 1),
        "of another request": {**signed(), "x-dynamo-booking": "yours"},
        "for another address": {**signed(), PREFILLERS_HEADER: f"192.0.2.1:8000,{prefiller}"},
    }
    before = await graph.counts()
    answers = [await graph.ask(what, decode, headers=headers) for what, headers in forged.items()]
    assert {each.status for each in answers} == {200}
    await graph.counted(
        before,
        {
            ("decode", "computed"): sum(each.prompt_tokens for each in answers),
            ("decode", "answered"): TOKENS * len(forged),
            ("decode", "invalid-grant"): len(forged),
        },
    )

    before = await graph.counts()
    followed = await graph.ask(long("mine"), decode, headers=signed())
    await graph.counted(
        before,
        {
            ("prefill", "computed"): followed.prompt_tokens,
            ("prefill", "answered"): 1,
            ("decode", "taken"): followed.prompt_tokens - 1,
            ("decode", "computed"): 1,
            ("decode", "answered"): TOKENS,
            ("decode", "remote"): 1,
        },
    )

    # This prompt is cached now, so that a prefill worker would be the client's wish alone.
    await graph.is_cached(long("mine"))
    before = await graph.counts()
    through = await graph.ask(long("mine"), headers=signed())
    assert (through.split, through.text) == ("decode-only(cached)", followed.text)
    assert (await graph.counts() - before).keys() == CACHED


@pytest.mark.timeout(300)
async def test_clients_steer_no_transfer(graph: Graph) -> None:
    """They neither have blocks kept nor read those of others, through the gateway or past it."""
    prefill, decode = graph.addresses("prefill"), graph.addresses("decode")
    read = {
        "do_remote_prefill": True,
        "remote_engine_id": "somebody's",
        "remote_request_id": "somebody's",
        "remote_block_ids": [[1, 2, 3]],
        "remote_host": next(iter(prefill.values())),
        "remote_port": SIDE_CHANNEL,
    }
    tried = (read, {"do_remote_decode": True}, {"do_remote_prefill": True})
    workers = [f"http://{address}:{HTTP_PORT}" for address in (prefill | decode).values()]
    before = await graph.counts()
    for where in ("", *workers):
        for number, params in enumerate(tried):
            own = {"kv_transfer_params": params}
            fields = {**own, "vllm_xargs": own}
            answer = await graph.ask(f"{number} for {where}", where, fields=fields)
            assert (answer.status, answer.body["kv_transfer_params"]) == (200, None), params
    # Those that came by the gateway were split, by the picker's will.
    since = await graph.counts() - before
    assert since["decode", "remote"] == len(tried)
    assert not since["decode", "not taken"]


@pytest.mark.timeout(300)
async def test_a_prefill_worker_that_dies_costs_no_request(graph: Graph) -> None:
    """What it had in hand is computed by the other one, and by nobody else: `enforce` is on."""

    def body(number: int) -> dict[str, Any]:
        prompt = long(f"request {number}")
        return {"model": graphs.MODEL, "prompt": prompt, "max_tokens": TOKENS}

    before = await graph.counts()
    async with Traffic(graph.url, envoy.SERVED, rate=6.0, body=body) as traffic:
        victim, address = next(iter(graph.addresses("prefill").items()))
        await graph.space.kill(victim, KILL_ENGINE, when=WHILE_IT_WORKS)
        traffic.mark("killed")
        await eventually(lambda: works_again(address), "it works again")
    assert traffic.lost == [], traffic.story()
    since = await graph.counts() - before
    assert since["decode", "remote"] == len(traffic.answers)
    assert since["decode", "asked in vain"] >= 1
    assert [since["decode", what] for what in ("local", "refused")] == [0, 0]


async def works_again(address: str) -> bool:
    """Whether the engine there has computed a prompt of those that came after it was killed."""
    async with aiohttp.ClientSession(f"http://{address}:{HTTP_PORT}") as client:
        try:
            async with client.get("/metrics") as response:
                page = await response.text()
        except aiohttp.ClientConnectionError:
            return False
    (line,) = [one for one in page.splitlines() if one.startswith("vllm:generation_tokens_total")]
    return float(line.rpartition(" ")[2]) > 0


@pytest.mark.timeout(300)
async def test_the_policies_admit_what_the_graph_does(graph: Graph) -> None:
    """The network of this cluster enforces none: what counts is what they say of real pods."""
    labels: dict[str, Json] = {"stranger": {"app": "stranger"}}
    for kind, selector in (
        *((kind, f"{TYPE}={kind}") for kind in ("epp", "prefill", "decode")),
        ("gateway", f"app={GATEWAY}"),
    ):
        labels[kind] = graph.objects.list("pods", selector)[0]["metadata"]["labels"]
    policies = [each["spec"] for each in graph.objects.list("networkpolicies")]
    public, ports = {HTTP_PORT, 9090}, {HTTP_PORT, 9090, 5557, SIDE_CHANNEL}
    for worker, other_side in (("prefill", "decode"), ("decode", "prefill")):
        admitted = {
            who: {port for port in ports if admits(policies, source, labels[worker], port)}
            for who, source in labels.items()
            if who != worker
        }
        assert admitted == {
            "epp": ports,
            other_side: ports,
            "gateway": public,  # the proxy asks the engine, and may stand anywhere
            "stranger": public,
        }


@pytest.mark.timeout(300)
async def test_without_prefill_workers_enforce_refuses_with_the_reason(graph: Graph) -> None:
    cached, new = long("before"), long("after")
    await graph.is_cached(cached)
    graph.objects.apply(wanted(prefill=0))
    await until(lambda: not graph.addresses("prefill"), "there is no prefill worker")

    async def is_refused() -> bool:
        return (await graph.ask(new)).status != 200

    await eventually(is_refused, "the picker knows")
    answer = await graph.ask(new)
    assert answer.status == 503
    assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-no-prefill-endpoints"
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.body["error"]["code"] == "no_prefill_worker_available"
    assert (await graph.ask(cached)).split == "decode-only(cached)"
