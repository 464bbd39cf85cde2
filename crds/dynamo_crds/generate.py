"""Writes the CustomResourceDefinitions that the models describe.

    python -m dynamo_crds.generate [--check] [--out DIR] [--service NAMESPACE/NAME]

The schemas are structural (apiextensions.k8s.io/v1): every node has a type, references are inlined,
closed objects prune what they do not declare. Cross-field rules become CEL.

Two versions of different shape are served, so the conversion strategy is `Webhook`, never `None`:
with `None` the API server would relabel a v1alpha1 object as v1beta1 and prune its services. The
files name the operator's conversion service by its default; an installer that puts it elsewhere
generates with `--service`, and in either case the webhook fills `caBundle`, which is a fact of the
cluster. Where no webhook runs, v1alpha1 must not be served either (`definition(kind, None)`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynamo_crds import v1alpha1, v1beta1
from dynamo_crds.schema import Resource

Json = dict[str, Any]

OWNER_LABEL = "app.kubernetes.io/managed-by"
OWNER = "dynamo-operator"
"""Tells our CRDs from those of an installed Dynamo, which have the same names."""

DEFAULT_OUT = Path(__file__).resolve().parent.parent
HEADER = "# Generated from the models by `python -m dynamo_crds.generate`; do not edit.\n"

_COPIED = (
    "type",
    "description",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
)


@dataclass(frozen=True, slots=True)
class WebhookService:
    """The Service that answers conversion reviews."""

    namespace: str = "dynamo-system"
    name: str = "dynamo-operator-webhook"
    path: str = "/convert"
    port: int = 443


@dataclass(frozen=True, slots=True)
class Kind:
    """What a CRD says beside its schemas. `columns`: version -> printer columns."""

    kind: str
    short: str
    columns: Mapping[str, tuple[Json, ...]]
    subresources: Json

    @property
    def plural(self) -> str:
        return f"{self.kind.lower()}s"

    @property
    def crd(self) -> str:
        """Name of the CustomResourceDefinition."""
        return f"{self.plural}.{v1beta1.GROUP}"

    @property
    def file(self) -> str:
        return f"{v1beta1.GROUP}_{self.plural}.yaml"


def _column(name: str, path: str, kind: str = "string", description: str = "") -> Json:
    column = {"name": name, "jsonPath": path, "type": kind}
    return {**column, "description": description} if description else column


_READY = '.status.conditions[?(@.type=="Ready")]'

_GRAPH_COLUMNS = (
    _column("Ready", f"{_READY}.status", description="Whether all of it runs and gets traffic"),
    _column("State", ".status.state", description="Summary of the conditions"),
    _column("Backend", ".spec.backendFramework", description="Engine"),
    _column("Age", ".metadata.creationTimestamp", "date"),
    # Last, because it is as long as it needs to be: one line says what is wrong.
    _column("Why", f"{_READY}.message", description="Why it is ready or not"),
)


def _adapter_columns(name: str, field: str) -> tuple[Json, ...]:
    return (
        _column("DGD", ".spec.dgdRef.name", description="Graph"),
        _column(name, f".spec.dgdRef.{field}", description="What is scaled"),
        _column("REPLICAS", ".spec.replicas", "integer", "Wanted replicas"),
        _column("CURRENT", ".status.replicas", "integer", "Observed replicas"),
        _column("AGE", ".metadata.creationTimestamp", "date"),
    )


KINDS = (
    Kind(
        "DynamoGraphDeployment",
        "dgd",
        {"v1beta1": _GRAPH_COLUMNS, "v1alpha1": _GRAPH_COLUMNS},
        {"status": {}},
    ),
    Kind(
        "DynamoGraphDeploymentScalingAdapter",
        "dgdsa",
        {
            "v1beta1": _adapter_columns("COMPONENT", "componentName"),
            "v1alpha1": _adapter_columns("SERVICE", "serviceName"),
        },
        {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
    ),
)


def _inlined(node: Json, definitions: Json) -> Json:
    """One node of pydantic's JSON schema as a structural schema: no references, no null."""
    while "$ref" in node:
        name = node["$ref"].removeprefix("#/$defs/")
        node = {**definitions[name], **{key: node[key] for key in node if key != "$ref"}}
    options = [option for option in node.get("anyOf", []) if option != {"type": "null"}]
    if len(options) == 1:
        rest = {key: value for key, value in node.items() if key != "anyOf"}
        return _inlined({**options[0], **_own(rest)}, definitions)
    result = {key: node[key] for key in _COPIED if key in node}
    if options:
        result["anyOf"] = options
    if "const" in node:
        result["type"] = "string"
    if isinstance(node.get("default"), str | int) and node["default"] != "":
        result["default"] = node["default"]
    if "properties" in node:
        result["properties"] = {
            name: _inlined(child, definitions) for name, child in node["properties"].items()
        }
        if node.get("required"):
            result["required"] = sorted(node["required"])
    elif isinstance(node.get("additionalProperties"), dict):
        result["additionalProperties"] = _inlined(node["additionalProperties"], definitions)
    if "items" in node:
        result["items"] = _inlined(node["items"], definitions)
    return result


def _own(field: Json) -> Json:
    """A field's own marks; they go before those of the type that it holds."""
    return {key: value for key, value in field.items() if value is not None}


def schema(model: type[Resource]) -> Json:
    """The structural schema of a whole object; `metadata` is the API server's own business."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    result = _inlined(raw, raw.get("$defs", {}))
    result["properties"]["metadata"] = {"type": "object"}
    for name in ("apiVersion", "kind"):
        result["properties"][name] = {"type": "string"}
    result["required"] = [n for n in result.get("required", []) if n != "metadata"]
    if not result["required"]:
        del result["required"]
    return result


def _version(kind: Kind, name: str, model: type[Resource], *, storage: bool) -> Json:
    entry: Json = {
        "name": name,
        "served": True,
        "storage": storage,
        "additionalPrinterColumns": [dict(column) for column in kind.columns[name]],
        "subresources": kind.subresources,
        "schema": {"openAPIV3Schema": schema(model)},
    }
    if not storage:
        entry["deprecated"] = True
        entry["deprecationWarning"] = (
            f"{v1beta1.GROUP}/{name} {kind.kind} is deprecated;"
            f" use {v1beta1.API_VERSION} {kind.kind}"
        )
    return entry


def definition(kind: Kind, service: WebhookService | None) -> Json:
    """The CustomResourceDefinition of one kind; without a webhook only v1beta1 is served."""
    old = _version(kind, v1alpha1.VERSION, v1alpha1.KINDS[kind.kind], storage=False)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": kind.crd,
            "labels": {OWNER_LABEL: OWNER},
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": v1beta1.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
                "shortNames": [kind.short],
            },
            "versions": [
                _version(kind, v1beta1.VERSION, v1beta1.KINDS[kind.kind], storage=True),
                old if service is not None else {**old, "served": False},
            ],
            "conversion": _conversion(service),
        },
    }


def _conversion(service: WebhookService | None) -> Json:
    if service is None:
        return {"strategy": "None"}
    place = {
        "namespace": service.namespace,
        "name": service.name,
        "path": service.path,
        "port": service.port,
    }
    webhook = {"clientConfig": {"service": place}, "conversionReviewVersions": ["v1"]}
    return {"strategy": "Webhook", "webhook": webhook}


class _Dumper(yaml.SafeDumper):
    """Writes every value in full: aliases are legal in a CRD, but nobody wants to read them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render(kind: Kind, service: WebhookService | None) -> str:
    """The text of one CRD file."""
    return HEADER + yaml.dump(
        definition(kind, service),
        Dumper=_Dumper,
        sort_keys=False,
        width=100,
        allow_unicode=True,
    )


def _service(text: str) -> WebhookService:
    namespace, slash, name = text.partition("/")
    if not (namespace and slash and name):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAMESPACE/NAME")
    return WebhookService(namespace, name)


def main(arguments: list[str] | None = None) -> int:
    """Writes the files, or with `--check` says which are not up to date (exit status 1)."""
    parser = argparse.ArgumentParser(
        prog="python -m dynamo_crds.generate",
        description="Write the CustomResourceDefinitions that the models describe.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the files")
    parser.add_argument(
        "--service",
        type=_service,
        default=WebhookService(),
        metavar="NAMESPACE/NAME",
        help="Service that answers conversion reviews",
    )
    options = parser.parse_args(arguments)
    stale = 0
    for kind in KINDS:
        path = options.out / kind.file
        text = render(kind, options.service)
        if options.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale += 1
                sys.stderr.write(f"{path}: not up to date; run python -m dynamo_crds.generate\n")
        else:
            path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path.name}: {len(text.encode()) / 1024:.1f} KiB\n")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
