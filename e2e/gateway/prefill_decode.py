"""A graph whose prompts two workers share, as tests see it: what its engines and workers count."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from e2e.gateway.pools import STATUS_PORT
from e2e.gateway.space import CHANGE_S, Space, eventually, samples
from e2e.gateway.traffic import ask
from e2e.operator import graphs
from e2e.operator.space import Json
from e2e.operator.space import Space as Objects

NAME, POOL, PICKER = "pd", "pd-pool", "pd-epp"
TYPE = "nvidia.com/dynamo-component-type"
ROLES = ("prefill", "decode")
TOKENS = 5
"""Of an answer."""
HTTP_PORT = 8000
THRESHOLDS = {"eff_isl_threshold": 512, "eff_isl_ratio_threshold": 0.9}
SLOW = ("--speed", "0.5")
"""A long prompt takes a prefill worker a tenth of a second."""
WORDS = " ".join(f"word{number}" for number in range(400))
NOTHING: Mapping[str, Any] = {}

ENGINE = {
    "computed": ("vllm:prompt_tokens_by_source_total", {"source": "local_compute"}),
    "cached": ("vllm:prompt_tokens_by_source_total", {"source": "local_cache_hit"}),
    "taken": ("vllm:prompt_tokens_by_source_total", {"source": "external_kv_transfer"}),
    "not taken": ("vllm:nixl_num_failed_transfers_total", {}),
    "answered": ("vllm:generation_tokens_total", {}),
    "done": ("vllm:request_success_total", {}),
}
"""Counters of tokens, of transfers that failed, and of requests."""
WORKER = {
    **{
        outcome: ("dynamo_worker_remote_prefills_total", {"outcome": outcome})
        for outcome in ("remote", "local", "refused", "rejected", "invalid-grant")
    },
    "asked in vain": ("dynamo_worker_prefiller_failures_total", {}),
    "told": ("dynamo_worker_requests_total", {}),
}
"""Counters of requests that came with prefill workers to ask, of those workers, and of all requests
that have left the engine."""

Counts = Counter[tuple[str, str]]
"""(role, name of a counter above) -> its sum over the role's pods."""


CACHED = {("decode", what) for what in ("cached", "computed", "answered")}
"""What is counted where a decode worker does all of it."""


def wanted(prefill: int = 2, annotations: Json | None = None) -> Json:
    """The graph: a prefill worker computes what is long and new, or nobody does."""
    picker = graphs.picker(
        DYN_ENFORCE_DISAGG="true",
        DYN_ROUTER_CONDITIONAL_DISAGG="true",
        DYN_ROUTER_CONDITIONAL_DISAGG_CONFIG=json.dumps(THRESHOLDS),
    )
    workers = (
        graphs.worker(prefill, *SLOW, name="Prefill", type="prefill"),
        graphs.worker(1, name="Decode", type="decode"),
    )
    return graphs.graph(NAME, picker, *workers, annotations=annotations)


def long(topic: str) -> str:
    """A long prompt that has no block in common with those of other topics."""
    return f"{topic}: {WORDS}"


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a completion."""

    status: int
    headers: dict[str, str]
    body: Any

    @property
    def prompt_tokens(self) -> int:
        return int(self.body["usage"]["prompt_tokens"])

    @property
    def text(self) -> str:
        return str(self.body["choices"][0]["text"])

    @property
    def split(self) -> str:
        """What the picker made of it, with the reason if it was not split."""
        fields = self.headers["x-dynamo-routing"].split(";")
        (found,) = [field for field in fields if field.startswith("disagg=")]
        return found.removeprefix("disagg=")


@dataclass(frozen=True, slots=True)
class Graph:
    """The graph, and the gateway before it."""

    space: Space
    objects: Objects
    url: str

    def addresses(self, role: str) -> dict[str, str]:
        """Pods of the role that do not end -> address."""
        return self.space.addresses(role, TYPE)

    async def ask(
        self,
        prompt: str,
        url: str = "",
        *,
        fields: Mapping[str, Any] = NOTHING,
        headers: Mapping[str, str] = NOTHING,
    ) -> Answer:
        """Through the gateway, or past it to the `url` of a worker; with further fields in the
        body, and further headers."""
        body = {"model": graphs.MODEL, "prompt": prompt, "max_tokens": TOKENS, **fields}
        async with aiohttp.ClientSession(url or self.url) as client:
            status, head, text = await ask(client, body, **headers)
        return Answer(status, head, json.loads(text))

    async def is_reached(self) -> None:
        """Ask until the decode worker answers: a proxy that does not know it yet chooses by itself
        among the pool's pods, and a prefill worker does both."""
        await self.space.answering(self.url)
        before = await self.counts()
        await eventually(lambda: self._answers(before), "the decode worker answers")

    async def _answers(self, before: Counts) -> bool:
        await self.ask("ready?")
        return (await self.counts() - before)["decode", "answered"] > 0

    async def is_cached(self, *prompts: str) -> None:
        """Ask until the picker knows that the decode worker has them."""
        async with asyncio.timeout(CHANGE_S):
            for prompt in prompts:
                while (answer := await self.ask(prompt)).split != "decode-only(cached)":
                    assert answer.status == 200, answer
                    await asyncio.sleep(0.1)

    async def counts(self) -> Counts:
        """What all of its workers have counted, once they were told of all that their engines have
        done."""
        async with asyncio.timeout(CHANGE_S):
            while True:
                found = await self._read()
                untold = [found.pop((role, "done")) - found.pop((role, "told")) for role in ROLES]
                if max(untold) <= 0:
                    return found
                await asyncio.sleep(0.05)

    async def _read(self) -> Counts:
        found: Counts = Counter()
        for role in ROLES:
            for address in self.addresses(role).values():
                for port, counters in ((HTTP_PORT, ENGINE), (STATUS_PORT, WORKER)):
                    page = await samples(address, port)
                    for what, (name, labels) in counters.items():
                        found[role, what] += sum(
                            round(one.value)
                            for one in page
                            if one.name == name and labels.items() <= one.labels.items()
                        )
        return found

    async def counted(self, before: Counts, expected: dict[tuple[str, str], int]) -> None:
        """Since `before` this was counted, and nothing else."""
        now = await self.counts() - before
        assert now == expected, f"{now} instead of {expected}"


async def long_ones_are_split(graph: Graph) -> list[Answer]:
    """Each long prompt is computed by a prefill worker and answered by the decode worker. What that
    one caches then, it does alone: the same with a little more, and short ones that begin alike.
    Returns the first answers."""
    prompts = [long(f"split {number}") for number in range(4)]
    count = len(prompts)
    before = await graph.counts()
    answers = await asyncio.gather(*map(graph.ask, prompts))
    assert {(each.status, each.split) for each in answers} == {(200, "prefill-decode")}
    tokens = sum(each.prompt_tokens for each in answers)
    await graph.counted(
        before,
        {
            ("prefill", "computed"): tokens,
            ("prefill", "answered"): count,
            ("decode", "taken"): tokens - count,
            ("decode", "computed"): count,  # the last token of each is computed in any case
            ("decode", "answered"): TOKENS * count,
            ("decode", "remote"): count,
        },
    )

    await graph.is_cached(*prompts)
    before = await graph.counts()
    again = await asyncio.gather(
        *(graph.ask(f"{prompt} and then?") for prompt in prompts),
        *(graph.ask(prompt[: len(prompt) // 8]) for prompt in prompts),
    )
    assert {(each.status, each.split) for each in again} == {(200, "decode-only(cached)")}
    since = await graph.counts() - before
    tokens = sum(each.prompt_tokens for each in again)
    assert since["decode", "cached"] + since["decode", "computed"] == tokens
    assert since["decode", "cached"] > 0.9 * tokens
    assert since["decode", "answered"] == 2 * TOKENS * count
    assert since.keys() == CACHED
    return answers


def admits(policies: list[Json], source: Json, target: Json, port: int) -> bool:
    """Whether NetworkPolicies let pods with the labels `source` reach this port of pods with the
    labels `target`. Reads what the operator writes of them: peers in the same namespace."""
    chosen = [policy for policy in policies if _matches(policy["podSelector"], target)]
    return not chosen or any(
        ("from" not in rule or any(_matches(peer["podSelector"], source) for peer in rule["from"]))
        and ("ports" not in rule or port in [each["port"] for each in rule["ports"]])
        for policy in chosen
        for rule in policy["ingress"]
    )


def _matches(selector: Json, labels: Json) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ())
    )
