"""Tells the API server whom to trust when it calls the webhook.

The bundle goes into the ValidatingWebhookConfiguration and, where the conversion is ours, into the
CRDs. It joins what is there and has not expired, because the other replica may still serve the
certificate of before, or already the next one; each patch tests that it meets what was read, so
that two who add at once both stand in it. Both objects are found by their names, and nothing else
of them is touched.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.resources import CRDS, VALIDATING_WEBHOOKS, Resource

from dynamo_operator.admission.certificates import joined
from dynamo_operator.admission.review import Json
from dynamo_operator.install.crds import Owner, crd_owner
from dynamo_operator.install.settings import CRD_NAMES

ATTEMPTS = 5
CHANGED_MEANWHILE = (409, 422)
"""409: by the API server's own comparison; 422: by the patch's test."""


class NotInPlace(Exception):
    """The API server can't be told yet; the message says what is missing."""


class CrdMissing(NotInPlace):
    """One of the CRDs is gone, and with it all graphs."""


def webhook_patch(configuration: Mapping[str, Any], bundle: bytes, now: datetime) -> list[Json]:
    """JSON patch that makes every webhook of a configuration trust `bundle`; [] if they do."""
    clients = {
        f"/webhooks/{index}/clientConfig": webhook["clientConfig"]
        for index, webhook in enumerate(configuration.get("webhooks") or [])
    }
    return _patch(configuration, clients, bundle, now)


def conversion_patch(crd: Mapping[str, Any], bundle: bytes, now: datetime) -> list[Json]:
    """JSON patch that makes a CRD's conversion trust `bundle`; [] if it does, or has no webhook."""
    conversion = crd["spec"].get("conversion") or {}
    client = (conversion.get("webhook") or {}).get("clientConfig")
    clients = {} if client is None else {"/spec/conversion/webhook/clientConfig": client}
    return _patch(crd, clients, bundle, now)


def _patch(
    item: Mapping[str, Any], clients: Mapping[str, Json], bundle: bytes, now: datetime
) -> list[Json]:
    """`clients`: each `clientConfig` of `item`, by its path there."""
    additions = [
        {"op": "add", "path": f"{path}/caBundle", "value": wanted}
        for path, client in clients.items()
        if (wanted := _trusted(client, bundle, now)) != client.get("caBundle")
    ]
    version = item["metadata"]["resourceVersion"]
    test = {"op": "test", "path": "/metadata/resourceVersion", "value": version}
    return [test, *additions] if additions else []


def _trusted(client: Mapping[str, Any], bundle: bytes, now: datetime) -> str:
    """What `caBundle` is to be: base64 of PEM."""
    try:
        present = base64.b64decode(client.get("caBundle") or "")
    except ValueError:
        present = b""
    return base64.b64encode(joined(bundle, present, now)).decode()


async def publish(
    client: KubernetesClient, bundle: bytes, configuration: str, now: datetime, *, conversion: bool
) -> Sequence[str]:
    """Bring the bundle where it belongs; the names of what was changed.

    `configuration` is the ValidatingWebhookConfiguration's name; `conversion` says whether the
    CRDs are this webhook's to serve. Raises `NotInPlace` if something is missing or not ours,
    `ApiError` if the API server fails, `ValueError` if `bundle` holds no certificates.
    """
    patch = functools.partial(webhook_patch, bundle=bundle, now=now)
    changed = await _bring(client, VALIDATING_WEBHOOKS, configuration, patch)
    if conversion:
        patch = functools.partial(_patch_of_ours, bundle=bundle, now=now)
        for name in CRD_NAMES:
            changed += await _bring(client, CRDS, name, patch)
    return changed


def _patch_of_ours(crd: Json, bundle: bytes, now: datetime) -> list[Json]:
    owner = crd_owner(crd)
    if owner != Owner.OURS:
        name = crd["metadata"]["name"]
        raise NotInPlace(f"CustomResourceDefinition {name} is not ours ({owner})")
    return conversion_patch(crd, bundle, now)


async def _bring(
    client: KubernetesClient, kind: Resource, name: str, patch: Callable[[Json], list[Json]]
) -> list[str]:
    """Patch one object if need be; its name, if it was changed."""
    path = kind.path(name=name)
    for attempt in range(1, ATTEMPTS + 1):
        operations = patch(await _read(client, kind, name))
        if not operations:
            break
        try:
            await client.json_patch(path, operations)
            return [name]
        except ApiError as error:
            if error.status not in CHANGED_MEANWHILE or attempt == ATTEMPTS:
                raise
    return []


async def _read(client: KubernetesClient, kind: Resource, name: str) -> Json:
    try:
        return await client.get(kind.path(name=name))
    except ApiError as error:
        if error.status != 404:
            raise
        missing = f"{kind.kind} {name} does not exist"
        if kind == CRDS:
            raise CrdMissing(f"{missing}; `dynamo operator crds --apply` makes it") from error
        raise NotInPlace(missing) from error
