"""What the end-to-end tests share: the real engine, a tiny model, addresses of their own.

Nothing here starts unless a test asks for it. Everything that was started is gone when its test
ends, also when it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dynamo_workers.engines import BadArguments
from dynamo_workers.engines.vllm import find_python
from dynamo_workers.tiny import write_model

HTTP_PORT, STATUS_PORT, STREAM_PORT = 8000, 9090, 5557


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

    def engine_pids(self) -> list[int]:
        """The engine's process, as the launcher's child."""
        task = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in task.read_text().split()]

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


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Poll ``condition`` where nothing can be awaited, such as another process's files."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
