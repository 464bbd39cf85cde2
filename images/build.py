"""Builds the platform's images with buildah: `python -m images.build [NAME…]`, or `make images`.

No daemon and no registry: layers lie in a storage of their own in the cache, each image is exported
as a docker-archive file that the test cluster imports, and is loaded at once if the cluster is up.
The base image is made from Debian's packages unless `BASE` names one to pull.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo_runtime import __version__

from e2e.cluster import Cluster, ClusterError, settings, toolchain
from e2e.cluster.progress import say

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "docker.io/dynamo-platform"
"""`dynamo-platform/NAME`, as a node's container runtime completes it."""
LOCAL_BASE = "localhost/python:3.11-slim"
DEBIAN = "bookworm"  # its Python is 3.11
LEFT_OUT = ("doc", "locale", "man")
"""Folders of /usr/share that the base image does without."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image and how it is built."""

    name: str
    file: str = "Containerfile"
    arguments: tuple[str, ...] = ()
    target: str = ""
    """Stage to stop at; "" for the last."""
    also: tuple[str, ...] = ()
    """Further names of the same image."""
    for_tests: bool = True
    """Whether `make images` builds it, and the test cluster gets it."""
    most_mb: int = 0
    """The largest its archive may be, in 10⁶ bytes: a tenth above what it is. 0: no limit."""

    @property
    def names(self) -> list[str]:
        """Its names with their tag, its own first."""
        own = self.name.partition("-")[0]
        return [f"{REPOSITORY}/{name}:{__version__}" for name in (own, *self.also)]


VLLM_ARGUMENTS = (f"WORKER={REPOSITORY}/worker:{__version__}",)
IMAGES = (
    Image("operator", arguments=("EXTRA=operator",), most_mb=310),
    Image("frontend", arguments=("EXTRA=epp", "ALSO=otel"), also=("epp",), most_mb=530),
    Image("worker", arguments=("EXTRA=worker",), most_mb=350),
    Image("planner", arguments=("EXTRA=planner",), most_mb=520),
    Image("vllm-mounted", "vllm.Containerfile", VLLM_ARGUMENTS, target="mounted", most_mb=350),
    Image("vllm", "vllm.Containerfile", VLLM_ARGUMENTS, for_tests=False),
)


class BuildFailed(Exception):
    """An image can't be built; the message ends with what the builder said."""


class Builder:
    """buildah with a storage of its own below `layout`."""

    def __init__(self, layout: settings.Layout) -> None:
        self.layout = layout

    def buildah(self, *arguments: str, echo: bool = False) -> str:
        """Run it; its output. Raises `BuildFailed` with the end of what it said."""
        command = [
            *("nice", "buildah", "--storage-driver", "overlay"),
            *("--root", str(self.layout.root / "buildah")),
            *("--runroot", str(self.layout.root / "buildah-run")),
            *arguments,
        ]
        done = subprocess.run(command, capture_output=not echo, text=True, check=False, cwd=ROOT)
        if done.returncode:
            said = (done.stdout or "")[-2000:] + (done.stderr or "")[-4000:]
            raise BuildFailed(f"buildah {' '.join(arguments[:1])}: {said.strip()}")
        return done.stdout or ""

    def has(self, tag: str) -> bool:
        return tag in self.buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()

    def ensure_base(self) -> None:
        """A stand-in for `python:3.11-slim`: Debian's minimal system with its Python.

        A virtual environment in /usr/local puts python, pip and packages where the real one has
        them.
        """
        if self.has(LOCAL_BASE):
            return
        say(f"making {LOCAL_BASE} from Debian {DEBIAN}")
        with tempfile.TemporaryDirectory() as scratch:
            excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in LEFT_OUT]
            command = [
                *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"),
                # Merged folders from the start: the package that merges them later wants all Perl.
                "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
                *("--include=python3-venv,ca-certificates,usr-is-merged", *excluded),
                *(DEBIAN, f"{scratch}/rootfs.tar"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BuildFailed(f"mmdebstrap: {done.stderr.strip()[-2000:]}")
            recipe = Path(scratch) / "Containerfile"
            recipe.write_text(
                "FROM scratch\n"
                "ADD rootfs.tar /\n"
                "RUN python3 -m venv /usr/local\n"
                "ENV PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8\n"
                'CMD ["python3"]\n'
            )
            options = ("--quiet", "--pull=never", "--isolation=chroot")
            self.buildah("bud", *options, "-f", str(recipe), "-t", LOCAL_BASE, scratch)

    def build(self, image: Image, base: str) -> None:
        """Build an image: it lies in the builder's storage under its first name."""
        tag = image.names[0]
        arguments = [f"BASE={base}", *image.arguments]
        with tempfile.TemporaryDirectory() as scratch:
            self.buildah(
                *("bud", "--quiet", "--layers", "--isolation=chroot"),
                *("--pull=never",) if base == LOCAL_BASE else (),
                *(f"--volume={volume}" for volume in lent(os.environ, Path(scratch))),
                *(f"--build-arg={argument}" for argument in arguments),
                *(f"--target={image.target}",) if image.target else (),
                *("-f", f"images/{image.file}", "-t", tag, "."),
            )

    def export(self, image: Image) -> Path:
        """Write the archive of an image, unless that very image was written last."""
        tag = image.names[0]
        archive = self.layout.images / f"{image.name}.tar"
        stamp = archive.with_name(f"{archive.name}.version")
        built = self.buildah("images", "--quiet", "--no-trunc", tag).strip()
        if archive.exists() and stamp.exists() and stamp.read_text() == built:
            return archive
        stamp.unlink(missing_ok=True)
        part = archive.with_suffix(".part")
        part.unlink(missing_ok=True)
        self.buildah("push", "--quiet", tag, f"docker-archive:{part}:{tag}")
        part.rename(archive)
        archive.with_name(f"{archive.name}.names").write_text("\n".join(image.names) + "\n")
        stamp.write_text(built)
        return archive


def lent(env: Mapping[str, str], scratch: Path) -> list[str]:
    """What RUN steps see of this machine, as `--volume` options; none of it is in the image.

    Its certificates (networks with an authority of their own need them), its pip settings, and the
    folder of wheels that those name.
    """
    volumes = []
    if Path("/etc/ssl/certs").is_dir():
        volumes.append("/etc/ssl/certs:/etc/ssl/certs:ro")
    lines = ["[global]"]
    for name, value in sorted(env.items()):
        if name.startswith("PIP_") and value:
            lines.append(f"{name.removeprefix('PIP_').lower().replace('_', '-')} = {value}")
    (scratch / "pip.conf").write_text("\n".join(lines) + "\n")
    volumes.append(f"{scratch}/pip.conf:/etc/pip.conf:ro")
    for folder in env.get("PIP_FIND_LINKS", "").split():
        if Path(folder).is_dir():
            volumes.append(f"{folder}:{folder}:ro")
    return volumes


def check_size(image: Image, size: int) -> None:
    """Raises `BuildFailed` if an archive of `size` bytes is larger than the image may be."""
    if image.most_mb and size > image.most_mb * 1e6:
        raise BuildFailed(
            f"{image.name} is {size / 1e6:.0f} MB, and may be {image.most_mb} MB: something came in"
            " that it does not need, or the limit in images/build.py is to be raised"
        )


def build(images: Sequence[Image], base: str = LOCAL_BASE) -> None:
    """Build and export images; load them into the cluster of our own if it is up."""
    cluster = Cluster()
    builder = Builder(cluster.layout)
    cluster.layout.images.mkdir(parents=True, exist_ok=True)
    with (cluster.layout.root / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if base == LOCAL_BASE:
            builder.ensure_base()
        for image in images:
            builder.build(image, base)
            if not image.for_tests:
                say(f"{image.name}: {image.names[0]}")
                continue
            archive = builder.export(image)
            check_size(image, archive.stat().st_size)
            say(f"{image.name}: {archive} ({archive.stat().st_size / 1e6:.0f} MB)")
            if not cluster.is_foreign and cluster.is_up and cluster.has_pods:
                cluster.load_image(archive)


def main() -> int:
    known = {image.name: image for image in IMAGES}
    parser = argparse.ArgumentParser(prog="python -m images.build", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument(
        "--base", default=os.environ.get("BASE", ""), help="base image to pull; default: made here"
    )
    options = parser.parse_args()
    if wrong := set(options.names) - set(known):
        parser.error(f"no such image: {', '.join(sorted(wrong))}; there are {', '.join(known)}")
    chosen = [known[name] for name in options.names] or [i for i in IMAGES if i.for_tests]
    try:
        toolchain.ensure_programs(toolchain.IMAGE_PROGRAMS)
        build(chosen, options.base or LOCAL_BASE)
    except (BuildFailed, ClusterError, toolchain.MissingPrograms) as error:
        sys.stderr.write(f"images: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
