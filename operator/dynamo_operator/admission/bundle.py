"""Tells the API server whom to trust when it calls the webhook.

The bundle goes into the ValidatingWebhookConfiguration and, where the conversion is ours, into the
CRDs; each patch tests that it meets what was read. Both objects are found by their names, and
nothing else of them is touched.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.resources import CRDS, VALIDATING_WEBHOOKS

from dynamo_operator.admission.review import Json
from dynamo_operator.install.crds import Owner, crd_owner
from dynamo_operator.install.settings import CRD_NAMES


class NotInPlace(Exception):
    """The API server can't be told yet; the message says what is missing."""


class CrdMissing(NotInPlace):
    """One of the CRDs is gone, and with it all graphs."""


def webhook_patch(configuration: Mapping[str, Any], bundle: bytes) -> list[Json]:
    """JSON patch that makes every webhook of a configuration trust `bundle`; [] if they do."""
    wanted = base64.b64encode(bundle).decode()
    patch: list[Json] = []
    for index, webhook in enumerate(configuration.get("webhooks") or []):
        if webhook["clientConfig"].get("caBundle") == wanted:
            continue
        at = f"/webhooks/{index}"
        patch.append({"op": "test", "path": f"{at}/name", "value": webhook["name"]})
        patch.append({"op": "add", "path": f"{at}/clientConfig/caBundle", "value": wanted})
    return patch


def conversion_patch(crd: Mapping[str, Any], bundle: bytes) -> list[Json]:
    """JSON patch that makes a CRD's conversion trust `bundle`; [] if it does, or has no webhook."""
    conversion = crd["spec"].get("conversion") or {}
    client = (conversion.get("webhook") or {}).get("clientConfig")
    wanted = base64.b64encode(bundle).decode()
    if client is None or client.get("caBundle") == wanted:
        return []
    at = "/spec/conversion"
    return [
        {"op": "test", "path": f"{at}/strategy", "value": "Webhook"},
        {"op": "add", "path": f"{at}/webhook/clientConfig/caBundle", "value": wanted},
    ]


async def publish(
    client: KubernetesClient, bundle: bytes, configuration: str, *, conversion: bool
) -> Sequence[str]:
    """Bring the bundle where it belongs; the names of what was changed.

    `configuration` is the ValidatingWebhookConfiguration's name; `conversion` says whether the
    CRDs are this webhook's to serve. Raises `NotInPlace` if something is missing or not ours,
    `ApiError` if the API server fails.
    """
    changed: list[str] = []
    path = VALIDATING_WEBHOOKS.path(name=configuration)
    found = await _read(client, path, f"ValidatingWebhookConfiguration {configuration}")
    changed += await _patch(client, path, webhook_patch(found, bundle))
    if conversion:
        for name in CRD_NAMES:
            path = CRDS.path(name=name)
            try:
                crd = await _read(client, path, f"CustomResourceDefinition {name}")
            except NotInPlace as missing:
                raise CrdMissing(f"{missing}; `dynamo operator crds --apply` makes it") from None
            owner = crd_owner(crd)
            if owner != Owner.OURS:
                raise NotInPlace(f"CustomResourceDefinition {name} is not ours ({owner})")
            changed += await _patch(client, path, conversion_patch(crd, bundle))
    return changed


async def _read(client: KubernetesClient, path: str, what: str) -> Json:
    try:
        return await client.get(path)
    except ApiError as error:
        if error.status == 404:
            raise NotInPlace(f"{what} does not exist") from error
        raise


async def _patch(client: KubernetesClient, path: str, patch: Sequence[Json]) -> list[str]:
    if not patch:
        return []
    await client.json_patch(path, patch)
    return [path.rsplit("/", 1)[1]]
