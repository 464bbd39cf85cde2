"""Operators under test: the installed one, and ones of this machine for a namespace of their own.

An operator that runs here takes the flags that a test wants, and marks its namespace, so that the
installed one leaves that alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from dynamo_operator.marker import MARKER

from e2e.operator.space import IMAGE_PREFIX, Space

READY_S = 180.0


def _first() -> None:
    """Before what else this machine does: what is tested is not how long an operator waits for a
    CPU."""
    with contextlib.suppress(PermissionError):
        os.nice(-5)


class HostOperator:
    """`dynamo operator run` as a process of this machine, for one namespace only."""

    def __init__(self, space: Space, *flags: str) -> None:
        self._space = space
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._log = tempfile.NamedTemporaryFile(prefix="operator-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dynamo_cli.main", "operator", "run"),
                *("--kubeconfig", str(space.cluster.kubeconfig)),
                *("--namespace", space.name, "--watch-namespace", space.name),
                *("--system-host", "127.0.0.1", "--system-port", str(self._port)),
                *(("--image-prefix", IMAGE_PREFIX) if IMAGE_PREFIX else ()),
                *flags,
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=_first,
            env={**os.environ, "POD_NAME": f"host-{self._port}"},
        )

    def __enter__(self) -> Self:
        """Returns when it is ready."""
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while not self._is_ready():
            assert self._process.poll() is None, f"it ended:\n{self.log}"
            assert time.monotonic() < deadline, f"not ready:\n{self.log}"
            time.sleep(0.1)
        # Until its mark stands, the namespace is the installed operator's.
        self._space.until(lambda: self._space.exists("lease", MARKER), "its mark", READY_S)

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        """Ends it in order, as a Deployment would; once is enough."""
        if self._log.closed:
            return
        self._process.terminate()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        print(f"--- operator of {self._space.name}\n{self.log[-6000:]}")  # if the test fails
        self._log.close()

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL: nothing is handed over."""
        self._process.kill()
        self._process.wait()

    def metric(self, name: str) -> float:
        """The sum of a metric over all its labels; 0 if there is none yet."""
        total = 0.0
        for line in self._read("/metrics").splitlines():
            if line.partition("{")[0].partition(" ")[0] == name:
                total += float(line.rpartition(" ")[2])
        return total

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self._read("/ready"))
        return False

    def _read(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5.0) as answer:
            text: str = answer.read().decode()
            return text
