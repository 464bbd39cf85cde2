"""Carrying out a plan: the only place of the operator that changes the cluster's objects.

Server-side apply under one field manager, forced, so that what is rendered is ours and everything
else stays whoever's it is. What is as it should be costs no request. An object that somebody else
made under a name that we need is never taken over.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, replace

from dynamo_runtime.kubernetes import resources
from dynamo_runtime.kubernetes.client import ApiError, ApiUnreachable, KubernetesClient

from dynamo_operator.diagnosis.fields import items, text
from dynamo_operator.reconcile.gather import GraphIndex
from dynamo_operator.reconcile.observed import Json, Key, Observed
from dynamo_operator.reconcile.ownership import (
    APPLIED_ANNOTATION,
    FIELD_MANAGER,
    ROLLOUT_MANAGER,
    Path,
    is_applied,
    is_left_behind,
    lost,
)
from dynamo_operator.reconcile.plan import Plan, Refused
from dynamo_operator.reconcile.planning import ADAPTER
from dynamo_operator.render import names

log = logging.getLogger(__name__)

SEED_MANAGER = "dynamo-operator-seed"
"""Writes the first number of an adapter, and never again."""


FAILURES = 3
"""Kinds whose writes the server failed at before the rest of a plan has to wait: each may have
taken as long as a webhook takes to time out."""


SECRET_BYTES = 32


class NamespaceGoing(Exception):
    """The graph's namespace is being deleted; there is nothing to keep in order any more."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a plan."""

    plan: Plan
    """With what was refused."""
    writes: int
    """Requests that changed something."""


class Applier:
    """Applies plans. It remembers what webhooks of others insist on, and which Secrets exist."""

    def __init__(self, client: KubernetesClient, index: GraphIndex) -> None:
        self._client = client
        self._index = index
        # Graph's uid -> object -> hash of the manifest and the fields that are taken from us each
        # time it is applied. Such a webhook's wish is respected, or the two would never rest.
        self._insisted: dict[str, dict[Key, tuple[str, frozenset[Path]]]] = {}
        self._secrets: dict[str, set[str]] = {}  # graph's uid -> Secrets that are known to exist

    async def carry_out(self, observed: Observed, plan: Plan) -> Applied:
        """Make the cluster's objects what `plan` says.

        One refused object does not keep the others from being applied; after a failure of the
        server (or of a webhook behind it) the rest of that kind waits for the next attempt, and
        after `FAILURES` all that remains. A Role is bound only once it is in order: a RoleBinding
        before it would hand out what somebody else's Role of that name allows. Raises
        `ApiUnreachable` if the API server does not answer, and `NamespaceGoing`.
        """
        refused: list[Refused] = []
        writes = 0
        failing: list[str] = []  # kinds
        roles: set[str] = set()  # names of those in order
        for manifest in plan.manifests:
            if manifest["kind"] in failing or len(failing) >= FAILURES:
                continue
            if manifest["kind"] == "RoleBinding" and manifest["roleRef"]["name"] not in roles:
                continue
            try:
                if manifest["kind"] == "Secret":
                    writes += await self._make_secret(observed, manifest)
                else:
                    writes += await self._apply(observed, plan, manifest)
            except ApiUnreachable:
                raise
            except (ApiError, ValueError) as error:
                refused.append(_refusal(manifest, error))
                if isinstance(error, ApiError) and error.status >= 500:
                    failing.append(manifest["kind"])
            else:
                if manifest["kind"] == "Role":
                    roles.add(manifest["metadata"]["name"])
        for key, number in sorted(plan.scale.items()):
            live = observed.children[key]
            try:
                answer = await self._client.merge_patch(
                    resources.of(live).path_of(live),
                    {"spec": {"replicas": number}},
                    field_manager=ROLLOUT_MANAGER,
                )
            except ApiUnreachable:
                raise
            except ApiError as error:
                refused += _unless_moot(live, error)
            else:
                writes += 1
                self._index.wrote(answer)
                log.info("%s/%s: %s %s → %d", observed.namespace, observed.name, *key, number)
        for key in plan.delete:
            live = observed.children[key]
            try:
                await self._client.delete(
                    resources.of(live).path_of(live),
                    uid=live["metadata"]["uid"],
                    propagation="Background",
                )
            except ApiUnreachable:
                raise
            except ApiError as error:
                refused += _unless_moot(live, error)
            else:
                writes += 1
                self._index.deleted(live)
                log.info("%s/%s: %s %s deleted", observed.namespace, observed.name, *key)
        return Applied(replace(plan, refused=tuple(refused)), writes)

    async def _apply(self, observed: Observed, plan: Plan, manifest: Json) -> int:
        key: Key = manifest["kind"], manifest["metadata"]["name"]
        live = observed.children.get(key)
        if is_applied(manifest, live) or self._is_insisted(observed, manifest, live):
            return 0
        if live is None:
            live = await self._existing(manifest)
            if live is not None:
                _check_owner(live, observed)
                self._index.wrote(live)
                if is_applied(manifest, live):
                    return 0  # the informer has not heard of it yet
        writes = 1
        if live is None and manifest["kind"] == ADAPTER:
            await self._seed(manifest, plan.seeds[key])
            writes += 1
        result = await self._merge(manifest, live)
        verb = "applied" if live is not None else "created"
        log.info("%s/%s: %s %s %s", observed.namespace, observed.name, *key, verb)
        self._index.wrote(result)
        self._remember(observed, manifest, result)
        return writes

    async def _make_secret(self, observed: Observed, manifest: Json) -> int:
        """Give the graph's Secret a content, once: the operator may create Secrets, and not read
        them. One that is there already is the graph's, whoever made it; that it has been deleted
        shows in a pod that waits for it."""
        name = manifest["metadata"]["name"]
        if name in self._secrets.get(observed.uid, ()) and not _is_awaited(name, observed):
            return 0
        content = {names.PAIRING_SECRET_KEY: secrets.token_hex(SECRET_BYTES)}
        writes = 1
        try:
            await self._client.create(
                {**manifest, "stringData": content}, field_manager=FIELD_MANAGER
            )
            log.info("%s/%s: Secret %s created", observed.namespace, observed.name, name)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            writes = 0
        self._secrets.setdefault(observed.uid, set()).add(name)
        return writes

    async def _merge(self, manifest: Json, live: Json | None) -> Json:
        try:
            return await self._client.apply(manifest, field_manager=FIELD_MANAGER)
        except ApiError as error:
            if error.status != 422 or live is None or manifest["kind"] != "Service":
                raise
            # A port that somebody renumbered is to a merge another port, with a name that ours has.
            ports = {"op": "replace", "path": "/spec/ports", "value": manifest["spec"]["ports"]}
            await self._client.json_patch(resources.SERVICES.path_of(manifest), [ports])
            return await self._client.apply(manifest, field_manager=FIELD_MANAGER)

    async def _existing(self, manifest: Json) -> Json | None:
        try:
            return await self._client.get(resources.of(manifest).path_of(manifest))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _seed(self, adapter: Json, number: int) -> None:
        metadata = adapter["metadata"]
        body = {
            "apiVersion": adapter["apiVersion"],
            "kind": adapter["kind"],
            "metadata": {
                key: metadata[key] for key in ("name", "namespace", "labels", "ownerReferences")
            },
            "spec": {**adapter["spec"], "replicas": number},
        }
        await self._client.create(body, field_manager=SEED_MANAGER)

    # --- fields that others insist on

    def _remember(self, observed: Observed, manifest: Json, result: Json) -> None:
        key: Key = manifest["kind"], manifest["metadata"]["name"]
        taken = frozenset(lost(manifest, result))
        if not taken:
            self._insisted.get(observed.uid, {}).pop(key, None)
            return
        self._insisted.setdefault(observed.uid, {})[key] = _mark(manifest), taken
        fields = ", ".join(sorted(".".join(path) for path in taken))
        where = f"{observed.namespace}/{observed.name}: {key[0]} {key[1]}"
        log.warning("%s: a webhook changes %s; left as it wants", where, fields)

    def _is_insisted(self, observed: Observed, manifest: Json, live: Json | None) -> bool:
        known = self._insisted.get(observed.uid, {}).get(
            (manifest["kind"], manifest["metadata"]["name"])
        )
        if known is None or live is None or live["metadata"].get("deletionTimestamp"):
            return False
        mark = (live["metadata"].get("annotations") or {}).get(APPLIED_ANNOTATION)
        return known[0] == mark == _mark(manifest) and frozenset(lost(manifest, live)) <= known[1]

    def forget(self, uid: str) -> None:
        """The graph with this uid is gone."""
        self._insisted.pop(uid, None)
        self._secrets.pop(uid, None)


def _is_awaited(secret: str, observed: Observed) -> bool:
    """Whether the kubelet holds a container of the graph back for want of the Secret."""
    return any(
        text(status, "state", "waiting", "reason") == "CreateContainerConfigError"
        and secret in text(status, "state", "waiting", "message")
        for pod in observed.pods
        for status in items(pod, "status", "containerStatuses")
    )


def _unless_moot(live: Json, error: ApiError) -> list[Refused]:
    """Nothing for an object that is gone or has changed by now: its event tells more."""
    return [] if error.status in (404, 409) else [_refusal(live, error)]


def _mark(manifest: Json) -> str:
    return str(manifest["metadata"]["annotations"][APPLIED_ANNOTATION])


def _check_owner(live: Json, observed: Observed) -> None:
    """Raises `ApiError` for what is neither this graph's nor left behind by one of its name."""
    owners = live["metadata"].get("ownerReferences") or ()
    if any(owner.get("uid") == observed.uid for owner in owners):
        return
    label = (live["metadata"].get("labels") or {}).get(names.GRAPH_LABEL)
    if label == names.bounded(observed.name) and is_left_behind(live):
        return
    name = f"{live['kind']} {live['metadata']['name']}"
    earlier = any(
        owner.get("kind") == observed.raw["kind"] and owner.get("name") == observed.name
        for owner in owners
    )
    if earlier or live["metadata"].get("deletionTimestamp"):
        raise ApiError(409, "Conflict", f"{name} of an earlier graph is still being deleted")
    raise ApiError(
        422,
        "NotOurs",
        f"{name} exists and does not belong to this graph: delete or rename it,"
        " or give the graph or the component another name",
    )


def _refusal(manifest: Json, error: ApiError | ValueError) -> Refused:
    metadata = manifest["metadata"]
    if isinstance(error, ApiError):
        if error.namespace_ends:
            raise NamespaceGoing(metadata["namespace"])
        message, status = error.message, error.status
    else:  # a name that can't be addressed
        message, status = str(error), 422
    return Refused(
        object=f"{manifest['kind']}/{metadata['name']}",
        message=message,
        component=(metadata.get("labels") or {}).get(names.COMPONENT_LABEL, ""),
        transient=status in (0, 404, 409, 429) or status >= 500,
    )
