"""What a machine that has never seen the project spends on `make e2e`, and on a second one.

A clone in an empty folder, with empty caches; the machine's own programs, root and network are what
it has, and the report says which of those that are needed were there. Leaves a dated report.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from e2e.cluster import toolchain

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "docs" / "reports"
CACHES = ("DYNAMO_CACHE", "UV_CACHE_DIR", "PIP_CACHE_DIR", "GOCACHE", "GOMODCACHE", "GOPATH")
PARTS = (
    ("setup", "the platform and its tests' libraries, into `.venv`"),
    ("vllm-cpu", "vLLM for CPU"),
    ("cluster-build", "Kubernetes, etcd, containerd and controllers, from source"),
    ("images", "container images"),
    ("e2e", "all of `make e2e`, with everything there"),
)
CLUSTER = "13"
"""Of the clone's own; the first is that of the tests around it."""
PROGRAMS = toolchain.NODE_PROGRAMS | toolchain.IMAGE_PROGRAMS
SAMPLE_S = 10.0


class Peak:
    """The most that the file system of `folder` holds beyond what it held at first, while the
    `with` lasts. What others write there counts too; asking the file system costs nothing, and
    walking the folder every time would be a load of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._used()
        self._most = self._before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def gigabytes(self) -> float:
        return (self._most - self._before) / 1e9

    def _used(self) -> int:
        return shutil.disk_usage(self._folder).used

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self._most = max(self._most, self._used())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._most = max(self._most, self._used())


@dataclass(frozen=True, slots=True)
class Machine:
    """A clone with caches of its own."""

    clone: Path
    caches: Path
    log: Path

    def make(self, target: str) -> float:
        """Seconds that a target takes."""
        env = {name: value for name, value in os.environ.items() if name not in CACHES}
        env |= {"XDG_CACHE_HOME": str(self.caches), "DYNAMO_CLUSTER": CLUSTER, "CI": "true"}
        began = time.monotonic()
        with (
            self.log.open("a") as log,
            subprocess.Popen(
                ["make", target],
                cwd=self.clone,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as running,
        ):
            try:
                status = running.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)
        if status:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])
            pytest.fail(f"make {target} ended with status {status}:\n{tail}")
        return time.monotonic() - began

    def gigabytes(self) -> tuple[float, float]:
        """Of the clone, and of its caches."""
        return _gigabytes(self.clone), _gigabytes(self.caches)


def _gigabytes(folder: Path) -> float:
    used = subprocess.run(
        ["du", "-sxk", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return int(used.stdout.split()[0]) / 1e6 if used.stdout else 0.0


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    # A short path: sockets lie below it.
    folder = Path(f"/var/tmp/fresh-{os.getpid()}")
    folder.mkdir()
    caches = folder / "cache"
    caches.mkdir()
    log = tmp_path_factory.mktemp("fresh") / "make.log"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    made = Machine(folder / "clone", caches, log)
    yield made
    shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_a_fresh_machine(machine: Machine) -> None:
    if os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG is set: a cluster that exists is no fresh machine")
    rows = []
    total = most = 0.0
    lacking = toolchain.missing(PROGRAMS)
    there = sorted(set(PROGRAMS.values()) - set(lacking)) + ["Go"] * bool(shutil.which("go"))
    already = 0.0  # what the parts before have left on the disk
    for target, what in (*PARTS, ("e2e", "once more, as after an edit")):
        with Peak(machine.caches) as peak:
            seconds = machine.make(target)
        is_first = len(rows) < len(PARTS)
        total += seconds if is_first else 0.0
        most = max(most, already + peak.gigabytes)
        clone, caches = machine.gigabytes()
        already = clone + caches
        rows.append(
            f"| `make {target}` | {what} | {minutes(seconds)} | {peak.gigabytes:.1f} |"
            f" {clone:.1f} | {caches:.1f} |"
        )
    text = f"""\
# A fresh machine, {time.strftime("%Y-%m-%d")}

`make e2e` in a fresh clone with empty caches, as its parts one after the other, and once more.
{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; load average
{os.getloadavg()[2]:.1f} at the end.

| | what | minutes | peak, GB | clone, GB | caches, GB |
|---|---|---|---|---|---|
{chr(10).join(rows)}

The first `make e2e`: {minutes(total)} minutes, the sum of its parts; the second:
{minutes(seconds)}. Clone and caches are what lies on the disk after each part; *peak* is by how
much the file system was fuller at most while the part ran, looked at every {SAMPLE_S:.0f} s: with
Go's caches, which go when the cluster is built. At most {most:.1f} GB were needed at one time.

Not fresh: the machine had git, make and Python with venv, and of the programs that the cluster and
the images take {", ".join(there) or "none"}. Had to be installed: {", ".join(lacking) or "none"}.
"""
    print(text)
    (REPORTS / f"{time.strftime('%Y-%m-%d')}-fresh-machine.md").write_text(text)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"
