"""Follows the objects that the rules of a pool come from.

Two API groups serve the same kinds (they moved from one to the other), and most clusters have
neither: a kind that is not served is asked for again once in a while, and is no problem.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.informer import Informer
from dynamo_runtime.kubernetes.resources import Resource

from dynamo_epp.models.rules import ModelRules, rules_from

log = logging.getLogger(__name__)

GROUPS = ("llm-d.ai", "inference.networking.x-k8s.io")  # where both serve a kind, the first wins
OBJECTIVES = tuple(
    Resource(f"{group}/v1alpha2", "InferenceObjective", "inferenceobjectives") for group in GROUPS
)
REWRITES = tuple(
    Resource(f"{group}/v1alpha2", "InferenceModelRewrite", "inferencemodelrewrites")
    for group in GROUPS
)
LOOK_AGAIN_S = 60.0
"""Pause before a kind that was not served is asked for again."""


async def follow_rules(
    client: KubernetesClient,
    namespace: str,
    pool: str,
    on_rules: Callable[[ModelRules], None],
    *,
    rng: random.Random,
    look_again_s: float = LOOK_AGAIN_S,
) -> None:
    """Tell ``on_rules`` the rules of ``pool`` whenever they change, until cancelled."""
    informers: dict[Resource, Informer] = {}
    last = ModelRules()

    def changed() -> None:
        nonlocal last
        rules = rules_from(
            (item for kind in OBJECTIVES if kind in informers for item in objects(kind)),
            (item for kind in REWRITES if kind in informers for item in objects(kind)),
            pool,
        )
        if rules != last:
            last = rules
            log.info(
                "pool %s: %d objectives, %d models rewritten%s",
                pool,
                len(rules.priorities),
                len(rules.exact),
                "" if rules.generic is None else ", and all others",
            )
            on_rules(rules)

    def objects(kind: Resource) -> list[dict[str, object]]:
        return list(informers[kind].objects.values())

    async def follow(kind: Resource) -> None:
        while True:
            if await _served(client, kind, namespace):
                break
            await asyncio.sleep(look_again_s)
        informers[kind] = Informer(
            client,
            kind,
            namespace=namespace,
            on_change=lambda old, new: changed(),
            rng=rng,
        )
        await informers[kind].run()

    async with asyncio.TaskGroup() as group:
        for kind in (*OBJECTIVES, *REWRITES):
            group.create_task(follow(kind), name=kind.full_name)


async def _served(client: KubernetesClient, kind: Resource, namespace: str) -> bool:
    try:
        await client.get(kind.path(namespace), limit=1)
    except ApiError as error:
        return error.status != 404  # whatever else is wrong, the informer will say
    return True
