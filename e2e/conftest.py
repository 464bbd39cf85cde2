"""What the end-to-end tests share: the real engine, a tiny model, addresses of their own.

Nothing here starts unless a test asks for it. Everything that was started is gone when its test
ends, also when it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from dynamo_cli.local.record import PodRecord, UpRecord
from dynamo_workers.engines import BadArguments
from dynamo_workers.engines.vllm import find_python
from dynamo_workers.tiny import write_model

from e2e.cluster.fixtures import cluster, namespace, own_pods, plane, pods

__all__ = ["cluster", "namespace", "own_pods", "plane", "pods"]

HTTP_PORT, STATUS_PORT, STREAM_PORT = 8000, 9090, 5557
START_S = 400.0
"""Two real engines take a minute and a half on two idle cores; the machine may do much else."""


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python that has vLLM. Without one a test is skipped, in CI it fails."""
    try:
        return find_python(os.environ)
    except BadArguments as missing:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI runs the real engine, and {missing}")
        pytest.skip(f"needs the real engine: {missing}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama that vLLM can load."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(folder)
    return folder


@pytest.fixture
def pod_address() -> Callable[[], str]:
    """Makes addresses 127.x.y.z on which all ports of a pod are free."""

    def make() -> str:
        while True:
            octets = (random.randrange(64, 255), random.randrange(256), random.randrange(1, 255))
            address = "127." + ".".join(map(str, octets))
            with contextlib.ExitStack() as held, contextlib.suppress(OSError):
                for port in (HTTP_PORT, STATUS_PORT, STREAM_PORT):
                    held.enter_context(socket.socket()).bind((address, port))
                return address

    return make


class Worker:
    """A worker pod's process under the launcher."""

    def __init__(self, kind: str, arguments: list[str], address: str, env: dict[str, str]) -> None:
        self.address = address
        self.name = f"worker-{address}"
        self.url = f"http://{address}:{HTTP_PORT}"
        self.status_url = f"http://{address}:{STATUS_PORT}"
        self.stream = f"tcp://{address}:{STREAM_PORT}"
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            ["nice", sys.executable, "-m", "dynamo_workers.worker", kind, *arguments],
            env={
                **os.environ,
                "POD_NAME": self.name,
                "DYN_HTTP_HOST": address,
                "DYN_SYSTEM_HOST": address,
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def engine_pid(self) -> int:
        """The engine's own process: the launcher's child that has the engine's flags."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        (engine,) = [pid for pid, line in lines.items() if "--kv-events-config" in line]
        return engine

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    async def ended(self, timeout_s: float = 60.0) -> int:
        """Its exit status."""
        status = await asyncio.wait_for(asyncio.to_thread(self._process.wait), timeout_s)
        self._reader.join(5.0)
        return status

    def close(self) -> None:
        """End it, in order if it still can."""
        if self.running:
            self.terminate()
            try:
                self._process.wait(40.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._reader.join(5.0)
        assert self._process.stdout is not None
        self._process.stdout.close()


StartWorker = Callable[..., Worker]


@pytest.fixture
def start_worker(pod_address: Callable[[], str]) -> Iterator[StartWorker]:
    """``start_worker(kind, arguments, **env) -> Worker``; all of them end with the test."""
    workers: list[Worker] = []

    def start(kind: str, arguments: list[str], **env: str) -> Worker:
        workers.append(Worker(kind, arguments, pod_address(), env))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()
        # Shown only if the test failed.
        print(f"--- {worker.name}", *worker.lines[-100:], sep="\n")


class Up:
    """`dynamo up FILE` in a process of its own, with temporary files in a folder of its own."""

    def __init__(self, file: Path) -> None:
        # Directly in /tmp: the engines' sockets lie in it, and a socket's path has to be short.
        self.folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
        self.state = self.folder / "state"
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            [
                *("nice", sys.executable, "-m", "dynamo_cli.main"),
                *("up", str(file), "--state-dir", str(self.state)),
            ],
            env={
                **os.environ,
                "TMPDIR": str(self.folder),
                "XDG_RUNTIME_DIR": str(self.folder),
            },
            cwd=file.parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def record(self) -> UpRecord | None:
        """What it says of itself at this moment."""
        for path in self.folder.glob("dynamo/up-*.json"):
            return msgspec.json.decode(path.read_bytes(), type=UpRecord)
        return None

    def ready(self) -> bool:
        record = self.record()
        return record is not None and record.ready

    @property
    def url(self) -> str:
        """Of its frontend."""
        record = self.record()
        assert record is not None, "it does not run"
        return record.url

    def pods(self, role: str) -> dict[str, PodRecord]:
        """Its pods of one component type, by name."""
        record = self.record()
        assert record is not None, "it does not run"
        return {pod.name: pod for pod in record.pods if pod.role == role}

    def wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            assert self.running, "it ended:\n" + "\n".join(self.lines[-60:])
            assert time.monotonic() < deadline, "not ready:\n" + "\n".join(self.lines[-60:])
            time.sleep(0.1)

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self._process.kill()

    def ended(self, timeout_s: float = 120.0) -> int:
        """Wait for its end; its exit status."""
        status = self._process.wait(timeout_s)
        self._reader.join(5.0)
        return status

    def processes(self) -> dict[int, str]:
        """Its processes, pods included, and their command lines.

        They are those with its folder in their environment or as their working folder: a process
        that sets its title (vLLM's core does) writes over its environment.
        """
        found: dict[int, str] = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (process / "environ").read_bytes()
                where = os.fsencode((process / "cwd").readlink())
                if os.fsencode(self.folder) in environment + where:
                    line = (process / "cmdline").read_text().replace("\0", " ").strip()
                    found[int(process.name)] = line
        return found

    def leftovers(self) -> list[str]:
        """What is left of it: processes, and whatever lies in its folder beside its logs."""
        files = [path for path in self.folder.iterdir() if path != self.state]
        return [f"{pid}: {line}" for pid, line in self.processes().items()] + [
            str(path) for path in files
        ]

    def close(self) -> None:
        """End it, in order if it still can, and remove its folder. Fails if it leaves anything."""
        if self.running:
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60.0)
        if self.running:
            self._process.kill()
        self._process.wait()
        self._reader.join(5.0)
        assert self._process.stdout is not None
        self._process.stdout.close()
        # Shown only if a test failed.
        print(f"--- dynamo up in {self.folder}", *self.lines[-100:], sep="\n")
        for log in sorted(self.state.rglob("*.log")):
            print(f"--- {log.parent.name}/{log.name}", log.read_text(errors="replace")[-6000:])
        left = self.leftovers()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert left == []


@pytest.fixture(scope="class")
def start_up(vllm_python: str) -> Iterator[Callable[[Path], Up]]:
    """``start_up(file) -> Up``: a graph with real engines, ready. It ends with the test class."""
    ups: list[Up] = []

    def start(file: Path) -> Up:
        ups.append(Up(file))
        ups[-1].wait_until_ready(START_S)
        return ups[-1]

    yield start
    with contextlib.ExitStack() as stack:
        for up in ups:
            stack.callback(up.close)
