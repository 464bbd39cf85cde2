"""What an author calls a field: each version of a graph has its own names.

Policy looks at graphs in v1beta1's form; what it says must name fields as they stand in the
manifest that somebody holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_crds import v1alpha1
from dynamo_crds.pod import MAIN
from dynamo_crds.problem import show_path
from dynamo_crds.schema import Path

_RENAMED = {"type": "componentType"}


@dataclass(frozen=True, slots=True)
class Wording:
    """Names fields in one version of a graph."""

    api_version: str

    @property
    def _old(self) -> bool:
        return self.api_version == v1alpha1.API_VERSION

    def component(self, index: int, name: str, *field: str | int) -> str:
        """A component's field: `spec.components[1].type`, `spec.services.Decode.componentType`."""
        if not self._old:
            return show_path(("spec", "components", index, *field))
        renamed = [_RENAMED.get(str(step), step) for step in field[:1]]
        return show_path(("spec", "services", name, *renamed, *field[1:]))

    def noun(self, name: str) -> str:
        """`component Worker`, `service Worker`."""
        return f"{'service' if self._old else 'component'} {name}"

    def in_pod_template(self, index: int, name: str, path: Path, container: str | None) -> str:
        """A field of a component's pod template; `container` is the container that it is in."""
        if not self._old:
            return self.component(index, name, "podTemplate", *path)
        if path[:1] == ("metadata",):
            return self.component(index, name, "extraPodMetadata", *path[1:])
        if container == MAIN:
            return self.component(index, name, "extraPodSpec", "mainContainer", *path[3:])
        return self.component(index, name, "extraPodSpec", *path[1:])

    def graph_env(self, *field: str | int) -> str:
        """The graph's own environment variables."""
        return show_path(("spec", "envs" if self._old else "env", *field))
