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

from dynamo_epp.models.rules import POOL_GROUP, ModelRules, rules_from

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
    group: str = POOL_GROUP,
    on_known: Callable[[], None] = lambda: None,
    look_again_s: float = LOOK_AGAIN_S,
) -> None:
    """Tell ``on_rules`` the rules of ``pool`` (of API group ``group``) whenever they change, until
    cancelled.

    ``on_known`` is called when all that there is at the beginning was told, or can't be at the
    moment.
    """
    informers: dict[Resource, Informer] = {}
    unknown = {*OBJECTIVES, *REWRITES}
    last = ModelRules()

    def changed() -> None:
        nonlocal last
        rules = rules_from(
            (item for kind in OBJECTIVES if kind in informers for item in objects(kind)),
            (item for kind in REWRITES if kind in informers for item in objects(kind)),
            pool,
            group,
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

    def known(kind: Resource) -> None:
        if kind in unknown:
            unknown.discard(kind)
            if not unknown:
                on_known()

    async def follow(kind: Resource) -> None:
        while True:
            if await _served(client, kind, namespace):
                break
            known(kind)
            await asyncio.sleep(look_again_s)
        informers[kind] = Informer(
            client,
            kind,
            namespace=namespace,
            on_change=lambda old, new: changed(),
            on_list=lambda version: known(kind),
            on_problem=lambda problem: known(kind),
            rng=rng,
        )
        await informers[kind].run()

    async with asyncio.TaskGroup() as tasks:
        for kind in (*OBJECTIVES, *REWRITES):
            tasks.create_task(follow(kind), name=kind.full_name)


async def _served(client: KubernetesClient, kind: Resource, namespace: str) -> bool:
    try:
        await client.get(kind.path(namespace), limit=1)
    except ApiError as error:
        return error.status != 404  # whatever else is wrong, the informer will say
    return True
