"""Programs, images and manifests of the cluster, built into the cache; what is there is kept.

Everything comes from Go modules with their versions in `settings`. Beside each result lies a stamp
that says what it was made from, so another version builds that one part again and nothing else.
Changing `-trimpath` or `CGO_ENABLED` compiles all of Kubernetes anew; `-ldflags` only links anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import archive, settings, toolchain
from e2e.cluster.progress import say
from e2e.cluster.settings import Layout

HERE = Path(__file__).parent
CONTAINERD_PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr")


class BuildError(Exception):
    """A part can't be built; says which and why."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file of the cache and how it is made."""

    path: Path
    made_from: str
    """Version, and whatever else decides its content."""
    make: Callable[[], None]

    @property
    def stamp(self) -> Path:
        return self.path.with_name(f"{self.path.name}.version")

    @property
    def is_current(self) -> bool:
        return (
            self.path.exists() and self.stamp.exists() and self.stamp.read_text() == self.made_from
        )


class Builder:
    """Makes parts below one layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._go = ""

    # --- Go

    def go(self, *arguments: str, folder: Path | None = None) -> str:
        """Run `go` with caches of its own; its output. Raises `BuildError` with what it said."""
        self._go = self._go or toolchain.find_go(self.layout)
        env = {
            **os.environ,
            "GOCACHE": str(self.layout.go / "build"),
            "GOMODCACHE": str(self.layout.go / "mod"),
            "GOBIN": str(self.layout.bin),
            "GOFLAGS": "-trimpath -modcacherw",
            "CGO_ENABLED": "0",
            **(
                {"GONOSUMDB": ",".join(settings.GO_SUMS)}
                if arguments[:2] == ("mod", "download")
                else {}
            ),
        }
        done = subprocess.run(
            ["nice", self._go, *arguments],
            cwd=folder or self.layout.go,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildError(
                f"go {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def module(self, path: str, version: str) -> Path:
        """The folder of a module's source."""
        found = json.loads(self.go("mod", "download", "-json", f"{path}@v{version}"))
        pinned = settings.GO_SUMS.get(path)
        if pinned and found["Sum"] != pinned:
            raise BuildError(f"{path}@v{version} is {found['Sum']}, not the pinned {pinned}")
        return Path(found["Dir"])

    def install(self, package: str, version: str) -> None:
        """A program of a module that can be installed from outside."""
        self.go("install", "-ldflags=-s -w", f"{package}@v{version}")

    def install_inside(self, module: str, version: str, package: str, program: str) -> None:
        """A program of a module that wants to be the main one (its go.mod replaces others)."""
        target = self.layout.bin / program
        self.go(
            *("build", "-ldflags=-s -w", "-o", str(target), package),
            folder=self.module(module, version),
        )

    def devcluster(self) -> None:
        flags = "-s -w"
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            major, minor, _ = settings.KUBERNETES.split(".")
            flags += f" -X {package}.gitVersion=v{settings.KUBERNETES}"
            flags += f" -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
        target = self.layout.bin / "devcluster"
        self.go("build", f"-ldflags={flags}", "-o", str(target), ".", folder=HERE / "devcluster")

    def pause(self) -> None:
        target = self.layout.bin / "pause"
        self.go("build", "-ldflags=-s -w", "-o", str(target), "./pause", folder=HERE / "devcluster")

    # --- manifests

    def kustomize(self, folder: Path) -> str:
        """What `kubectl kustomize` makes of a folder."""
        program = [str(self.layout.bin / "devcluster"), "kubectl", "kustomize", str(folder)]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"kubectl kustomize {folder}: {done.stderr.strip()}")
        return done.stdout

    def join(self, target: str, files: list[Path]) -> None:
        """Several manifests in one file."""
        text = "\n---\n".join(path.read_text() for path in files)
        (self.layout.manifests / target).write_text(text)

    def kwok_stages(self) -> None:
        """kwok's own rules of how a fake node or pod lives; without them it does nothing."""
        stage = self.module("sigs.k8s.io/kwok", settings.KWOK) / "kustomize" / "stage"
        names = ["node/fast/node-initialize"] + [
            f"pod/fast/pod-{n}" for n in ("ready", "complete", "delete")
        ]
        self.join("kwok.yaml", [stage / f"{name}.yaml" for name in names])

    def gateway_api(self) -> None:
        module = self.module("sigs.k8s.io/gateway-api", settings.GATEWAY_API)
        self.join(
            "gateway-api.yaml", sorted((module / "config/crd/standard").glob("gateway*.yaml"))
        )

    def inference_extension(self) -> None:
        path = "sigs.k8s.io/gateway-api-inference-extension"
        module = self.module(path, settings.INFERENCE_EXTENSION)
        self.join("inference-extension.yaml", sorted((module / "config/crd/bases").glob("*.yaml")))

    def prometheus_operator(self) -> None:
        path = "github.com/prometheus-operator/prometheus-operator"
        module = self.module(path, settings.PROMETHEUS_OPERATOR)
        kind = module / "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"
        self.join("pod-monitor.yaml", [kind])

    def lws(self) -> None:
        module = self.module("sigs.k8s.io/lws", settings.LWS)
        (self.layout.manifests / "lws.yaml").write_text(self.kustomize(module / "config/default"))

    def metrics_server(self) -> None:
        module = self.module("sigs.k8s.io/metrics-server", settings.METRICS_SERVER)
        text = self.kustomize(module / "manifests/base")
        (self.layout.manifests / "metrics-server.yaml").write_text(text)

    # --- images

    def image(
        self,
        name: str,
        tag: str,
        programs: Mapping[str, Path],
        links: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """An image of static programs (path in it -> file); the first is the entrypoint."""
        target = self.layout.images / f"{name}.tar"
        entrypoint = [next(iter(programs))] if not links else []
        archive.write(target, tag, programs, entrypoint, platform.machine(), links)

    def busybox(self) -> None:
        program = Path("/bin/busybox")
        listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
        names = [name for name in listed.stdout.split() if name != "busybox"]
        links = tuple((f"/bin/{name}", "busybox") for name in names)
        self.image("busybox", settings.BUSYBOX_IMAGE, {"/bin/busybox": program}, links)


def digest(*paths: Path) -> str:
    """What tells these files from others."""
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def control_plane(builder: Builder) -> list[Part]:
    """What every shape of the cluster needs."""
    layout, source = builder.layout, HERE / "devcluster"
    program = (
        f"{settings.KUBERNETES} {digest(*(source / n for n in ('go.mod', 'go.sum', 'main.go')))}"
    )
    kwok = ("sigs.k8s.io/kwok/cmd/kwok", settings.KWOK)
    return [
        Part(layout.bin / "devcluster", program, builder.devcluster),
        Part(layout.bin / "kwok", settings.KWOK, lambda: builder.install(*kwok)),
        Part(layout.manifests / "kwok.yaml", settings.KWOK, builder.kwok_stages),
        Part(layout.manifests / "gateway-api.yaml", settings.GATEWAY_API, builder.gateway_api),
        Part(
            layout.manifests / "inference-extension.yaml",
            settings.INFERENCE_EXTENSION,
            builder.inference_extension,
        ),
        Part(
            layout.manifests / "pod-monitor.yaml",
            settings.PROMETHEUS_OPERATOR,
            builder.prometheus_operator,
        ),
    ]


def node(builder: Builder) -> list[Part]:
    """What pods need: the container runtime, DNS, add-ons."""
    layout = builder.layout

    def containerd(program: str) -> Callable[[], None]:
        package = f"github.com/containerd/containerd/v2/cmd/{program}"
        return lambda: builder.install(package, settings.CONTAINERD)

    def image(name: str, tag: str, version: str) -> Part:
        program = layout.bin / name
        return Part(
            layout.images / f"{name}.tar",
            f"{tag} {version}",
            lambda: builder.image(name, tag, {f"/{name}": program}),
        )

    lws = ("sigs.k8s.io/lws", settings.LWS, "./cmd", "lws-controller")
    metrics = (
        "sigs.k8s.io/metrics-server",
        settings.METRICS_SERVER,
        "./cmd/metrics-server",
        "metrics-server",
    )
    pause = digest(HERE / "devcluster" / "pause" / "main.go")
    coredns = ("github.com/coredns/coredns", settings.COREDNS)
    return [
        *(
            Part(layout.bin / program, settings.CONTAINERD, containerd(program))
            for program in CONTAINERD_PROGRAMS
        ),
        Part(layout.bin / "coredns", settings.COREDNS, lambda: builder.install(*coredns)),
        Part(layout.bin / "pause", pause, builder.pause),
        Part(layout.bin / "lws-controller", settings.LWS, lambda: builder.install_inside(*lws)),
        Part(layout.manifests / "lws.yaml", settings.LWS, builder.lws),
        Part(
            layout.manifests / "metrics-server.yaml",
            settings.METRICS_SERVER,
            builder.metrics_server,
        ),
        Part(
            layout.bin / "metrics-server",
            settings.METRICS_SERVER,
            lambda: builder.install_inside(*metrics),
        ),
        image("pause", settings.PAUSE_IMAGE, pause),
        image("coredns", settings.COREDNS_IMAGE, settings.COREDNS),
        image("lws-controller", settings.LWS_IMAGE, settings.LWS),
        image("metrics-server", settings.METRICS_SERVER_IMAGE, settings.METRICS_SERVER),
        Part(
            layout.images / "busybox.tar",
            f"{settings.BUSYBOX_IMAGE} {digest(Path('/bin/busybox'))}",
            builder.busybox,
        ),
    ]


Further = Callable[[Builder], list[Part]]
"""Parts beyond those that every cluster needs (`on_demand`)."""


def build(layout: Layout, with_node: bool, further: Sequence[Further] = ()) -> bool:
    """Build what is missing or of another version; whether anything was.

    Raises `BuildError`, and `MissingPrograms` for what only root can install.
    """
    if with_node:
        toolchain.ensure_programs(toolchain.NODE_PROGRAMS)
    for folder in (layout.bin, layout.manifests, layout.images, layout.go):
        folder.mkdir(parents=True, exist_ok=True)
    with (layout.root / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(layout, with_node, further)


def _build(layout: Layout, with_node: bool, further: Sequence[Further]) -> bool:
    builder = Builder(layout)
    parts = control_plane(builder) + (node(builder) if with_node else [])
    for more in further:
        parts += more(builder)
    due = [part for part in parts if not part.is_current]
    for number, part in enumerate(due, start=1):
        say(f"building {part.path.name} {part.made_from} ({number} of {len(due)})")
        part.stamp.unlink(missing_ok=True)
        part.make()
        part.stamp.write_text(part.made_from)
    if due and not os.environ.get("DYNAMO_KEEP_GO_CACHE"):
        for cache in ("build", "mod"):
            shutil.rmtree(layout.go / cache, ignore_errors=True)
    return bool(due)
