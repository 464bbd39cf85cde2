"""What the tests of rendering share: a platform with a fixed tag, and short ways to a graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dynamo_crds.v1beta1 import DynamoGraphDeployment
from dynamo_operator.render import Platform, Rendered, render_with_notes

FOLDER = Path(__file__).parent
Graph = Callable[..., DynamoGraphDeployment]


@pytest.fixture
def platform() -> Platform:
    return Platform(image_tag="test")


@pytest.fixture
def graph() -> Graph:
    """A graph of the given components (as in a manifest); keywords are fields of its spec."""

    def build(*components: dict[str, Any], name: str = "g", **spec: Any) -> DynamoGraphDeployment:
        return DynamoGraphDeployment.model_validate(
            {"metadata": {"name": name}, "spec": {"components": list(components), **spec}}
        )

    return build


class View:
    """One rendered component, easy to look at."""

    def __init__(self, rendered: Rendered, name: str) -> None:
        self.rendered = rendered
        self.deployment = next(
            m
            for m in rendered.manifests
            if m["kind"] == "Deployment"
            and m["metadata"]["labels"]["nvidia.com/dynamo-component"] == name
        )
        self.template = self.deployment["spec"]["template"]
        self.pod = self.template["spec"]
        self.main = next(c for c in self.pod["containers"] if c["name"] == "main")
        self.env = {entry["name"]: entry.get("value") for entry in self.main["env"]}
        self.ports = {port["name"]: port["containerPort"] for port in self.main.get("ports", [])}
        self.reasons = [note.reason for note in rendered.notes if note.component == name]

    def objects(self, kind: str) -> list[dict[str, Any]]:
        return [m for m in self.rendered.manifests if m["kind"] == kind]


@pytest.fixture
def one(graph: Graph, platform: Platform) -> Callable[..., View]:
    """Renders a graph of one component called `c` with the given main container and pod spec."""

    def build(
        main: dict[str, Any] | None = None,
        *,
        type: str | None = "worker",
        pod: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        spec: dict[str, Any] | None = None,
        **component: Any,
    ) -> View:
        template: dict[str, Any] = {"spec": dict(pod or {})}
        if main is not None:
            others = template["spec"].get("containers", [])
            template["spec"]["containers"] = [{"name": "main", **main}, *others]
        if metadata:
            template["metadata"] = metadata
        described = {"name": "c", "type": type, "podTemplate": template, **component}
        return View(render_with_notes(graph(described, **(spec or {})), platform), "c")

    return build
