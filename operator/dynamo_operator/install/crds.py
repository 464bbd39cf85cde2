"""The CRDs in a cluster: whose they are, and putting ours there.

NVIDIA Dynamo installs CRDs of the same names. Two operators that overwrite each other's schemas
lose people's fields, so ours are told by a label, Dynamo's by what its charts leave on theirs, and
nothing that is not ours is ever written unless somebody says so.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_crds.generate import KINDS, OWNER, OWNER_LABEL, Kind, WebhookService, definition
from dynamo_runtime import __version__
from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.resources import CRDS

from dynamo_operator.install.settings import CRD_NAMES

Json = dict[str, Any]

FIELD_MANAGER = "dynamo-operator-crds"
RELEASE_LABEL = "app.kubernetes.io/version"
"""The release that wrote a CRD: a pod of an older one that starts anew, in the middle of an upgrade
or forgotten somewhere, would take fields away, and their values with the next write."""
ATTEMPTS = 4


class Owner(enum.StrEnum):
    """Whose a CRD is."""

    OURS = "ours"
    DYNAMO = "dynamo"
    UNKNOWN = "unknown"


class ForeignCrds(Exception):
    """CRDs of our names that are not ours; the message names them and says what to do."""

    def __init__(self, found: Sequence[tuple[str, Owner, str]]) -> None:
        """`found`: name, owner, how that is known."""
        self.found = tuple(found)
        lines = [
            f"- {name}: {'an installed Dynamo' if owner is Owner.DYNAMO else 'unknown owner'}"
            f" ({sign})"
            for name, owner, sign in found
        ]
        super().__init__(
            "\n".join(
                [
                    "CustomResourceDefinitions of these names exist and are not ours; nothing was "
                    "changed:",
                    *lines,
                    "Two operators can't share them. Use another cluster; or uninstall the other "
                    "operator (its graphs stay), then hand the CRDs over with "
                    "`dynamo operator crds --apply --take-over`.",
                ]
            )
        )


def crd_owner(crd: Mapping[str, Any] | None) -> Owner | None:
    """Whose a CRD is, as it stands in the cluster; None if there is none."""
    return None if crd is None else _sign(crd)[0]


def _sign(crd: Mapping[str, Any]) -> tuple[Owner, str]:
    """The owner, and the mark it is known by. Dynamo's marks count first: its installer leaves our
    label on what it overwrites."""
    for mark in _marks_of_dynamo(crd):
        return Owner.DYNAMO, mark
    labels = (crd.get("metadata") or {}).get("labels") or {}
    if labels.get(OWNER_LABEL) == OWNER:
        return Owner.OURS, f"label {OWNER_LABEL}"
    return Owner.UNKNOWN, f"no label {OWNER_LABEL}={OWNER}"


def _marks_of_dynamo(crd: Mapping[str, Any]) -> Iterator[str]:
    metadata = crd.get("metadata") or {}
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    if "controller-gen.kubebuilder.io/version" in annotations:
        yield "annotation controller-gen.kubebuilder.io/version"
    for label in ("app.kubernetes.io/name", "app.kubernetes.io/part-of", "helm.sh/chart"):
        value = str(labels.get(label) or "")
        if value.startswith(("dynamo-platform", "dynamo-operator", "dynamo-crds")):
            yield f"label {label}={value}"
    release = annotations.get("meta.helm.sh/release-name")
    if release is not None:
        yield f"Helm release {release}"
    spec = crd.get("spec") or {}
    webhook = (spec.get("conversion") or {}).get("webhook") or {}
    service = ((webhook.get("clientConfig") or {}).get("service") or {}).get("name")
    if service == "dynamo-operator-webhook-service":
        yield f"conversion by Service {service}"
    if _has_full_pod_schema(spec):
        yield "schema with all fields of a pod"


def _has_full_pod_schema(spec: Mapping[str, Any]) -> bool:
    """Ours declare only a core of the pod template; Dynamo's all of it."""
    for version in spec.get("versions") or []:
        node: Any = (version.get("schema") or {}).get("openAPIV3Schema") or {}
        for step in (
            *("properties", "spec", "properties", "components", "items", "properties"),
            *("podTemplate", "properties", "spec", "properties", "ephemeralContainers"),
        ):
            node = node.get(step) if isinstance(node, Mapping) else None
        if node is not None:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one CRD: "created", "updated", "unchanged", or "left to release X", which is
    newer than this one."""

    name: str
    result: str


async def apply_crds(
    client: KubernetesClient, service: WebhookService | None, *, take_over: bool = False
) -> list[Applied]:
    """Install or update our CRDs; all of them, or none if one is not ours.

    `service` answers conversions (None: only v1beta1 is served); a CA bundle that is there stays.
    Those that a newer release of ours wrote are left as they are. `take_over` replaces those, too,
    and those of others. Raises `ForeignCrds`, `ApiError`.
    """
    present = {name: await _get(client, name) for name in CRD_NAMES}
    if not take_over:
        _refuse_foreign(present)
    return [
        await _apply(client, released(kind, service), present[kind.crd], take_over)
        for kind in KINDS
    ]


def released(kind: Kind, service: WebhookService | None) -> Json:
    """The definition of a kind, with the release that it is of."""
    crd = definition(kind, service)
    labels = {**crd["metadata"]["labels"], RELEASE_LABEL: __version__}
    return {**crd, "metadata": {**crd["metadata"], "labels": labels}}


def newer_release(crd: Mapping[str, Any], than: str = __version__) -> str:
    """The release that wrote a CRD of ours, if it is newer; "" if not, or if it does not say."""
    said = str(((crd.get("metadata") or {}).get("labels") or {}).get(RELEASE_LABEL) or "")
    return said if _numbers(said) > _numbers(than) else ""


def _numbers(release: str) -> tuple[int, ...]:
    """`1.12.0rc1` as (1, 12, 0)."""
    found = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


async def check_owner(client: KubernetesClient) -> list[str]:
    """Names of our CRDs that are not there. Raises `ForeignCrds` if CRDs of our names are somebody
    else's: their graphs are, too."""
    present = {name: await _get(client, name) for name in CRD_NAMES}
    _refuse_foreign(present)
    return [name for name, crd in present.items() if crd is None]


def _refuse_foreign(present: Mapping[str, Json | None]) -> None:
    foreign = [
        (name, *_sign(crd))
        for name, crd in present.items()
        if crd is not None and crd_owner(crd) is not Owner.OURS
    ]
    if foreign:
        raise ForeignCrds(foreign)


async def _get(client: KubernetesClient, name: str) -> Json | None:
    try:
        return await client.get(CRDS.path(name=name))
    except ApiError as error:
        if error.status == 404:
            return None
        raise


async def _apply(
    client: KubernetesClient, wanted: Json, present: Json | None, take_over: bool
) -> Applied:
    name = wanted["metadata"]["name"]
    for attempt in range(ATTEMPTS):
        if present is not None and not take_over and (newer := newer_release(present)):
            return Applied(name, f"left to release {newer}")
        try:
            if present is None:
                # An apply that creates needs the right to create objects of this name only;
                # a POST would need the right to create any.
                await client.apply(wanted, field_manager=FIELD_MANAGER, force=True)
                return Applied(name, "created")
            after = await client.replace(
                CRDS.path(name=name), replacement(present, wanted), field_manager=FIELD_MANAGER
            )
            same = _version(after) == _version(present)
            return Applied(name, "unchanged" if same else "updated")
        except ApiError as error:
            if error.status != 409 or attempt == ATTEMPTS - 1:
                raise
            present = await _get(client, name)
    raise AssertionError("unreachable")


def _version(manifest: Json) -> Any:
    return manifest["metadata"].get("resourceVersion")


def replacement(present: Json, wanted: Json) -> Json:
    """What takes the place of a CRD that exists. Whole, because schemas that are merged field by
    field would be neither the old nor the new ones; what others wrote beside the schema stays."""
    metadata = dict(present["metadata"])
    ours = crd_owner(present) is Owner.OURS
    for part in ("labels", "annotations"):
        kept = (metadata.get(part) or {}) if ours else {}
        metadata[part] = {**kept, **wanted["metadata"].get(part, {})}
    metadata.pop("managedFields", None)
    result = {**wanted, "metadata": metadata}
    bundle = _bundle(present)
    webhook = wanted["spec"]["conversion"].get("webhook")
    if ours and bundle and webhook:
        client = {**webhook["clientConfig"], "caBundle": bundle}
        conversion = {"strategy": "Webhook", "webhook": {**webhook, "clientConfig": client}}
        result["spec"] = {**wanted["spec"], "conversion": conversion}
    return result


def _bundle(crd: Json) -> str | None:
    webhook = (crd["spec"].get("conversion") or {}).get("webhook") or {}
    return (webhook.get("clientConfig") or {}).get("caBundle")
