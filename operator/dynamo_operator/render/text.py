"""Manifests as text: the same bytes for the same manifests, whatever the order of their keys."""

from collections.abc import Sequence
from typing import Any

import msgspec
import yaml

from dynamo_operator.render.canonical import canonical
from dynamo_operator.render.graph import Manifest


class _Dumper(yaml.SafeDumper):
    """Writes what is shared twice: `&anchors` in manifests are for people who typed them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    style = "|" if "\n" in data else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """YAML documents, keys sorted, in the order given."""
    return yaml.dump_all(
        manifests,
        Dumper=_Dumper,
        explicit_start=True,
        sort_keys=True,
        width=100,
        allow_unicode=True,
    )


def to_json(manifests: Sequence[Manifest]) -> str:
    """One Kubernetes `List` with all manifests, keys sorted, indented."""
    listed = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
    return msgspec.json.format(canonical(listed), indent=2).decode() + "\n"
