"""An operator as a process of this machine: the very command that its Deployment runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from e2e.operator_control.plane import SYSTEM, Plane

START_S = 180.0
STOP_S = 30.0
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


class Operator:
    """`dynamo operator run` under one account of a plane. Making the object starts it."""

    def __init__(
        self,
        plane: Plane,
        account: str,
        *,
        namespaces: Sequence[str] = (),
        lease: str = "",
        extra: Sequence[str] = (),
    ) -> None:
        """`namespaces` empty: cluster-wide. `lease`: namespace of its leader lease."""
        self.account = account
        self.lines: list[str] = []
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dynamo_cli.main", "operator", "run"),
                *("--kubeconfig", str(plane.kubeconfig(account))),
                *("--namespace", lease or SYSTEM),
                *("--system-host", "127.0.0.1", "--system-port", str(port)),
                *(part for name in namespaces for part in ("--watch-namespace", name)),
                *extra,
            ],
            env={key: value for key, value in os.environ.items() if not key.startswith("DYN_")},
            stdin=subprocess.DEVNULL,
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
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """The end of its log."""
        return "\n".join(self.lines[-25:])

    # --- what it says

    async def metrics(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """(name, values of the labels in the order of their names) -> value."""
        text = await asyncio.to_thread(self._get, "/metrics")
        return {
            (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def total(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(value for (found, _), value in (await self.metrics()).items() if found == name)

    async def is_ready(self) -> bool:
        """Whether its readiness probe says so."""
        try:
            await asyncio.to_thread(self._get, "/ready")
        except OSError:
            return False
        return True

    async def leads(self) -> bool:
        """Whether it has the lease, and reconciles."""
        try:
            return await self.total("leader_election_master_status") == 1.0
        except OSError:
            return False

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=10.0) as answer:
            content: bytes = answer.read()
            return content.decode()

    # --- what it costs

    @property
    def memory(self) -> int:
        """Resident memory in bytes."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * PAGE

    @property
    def cpu_seconds(self) -> float:
        """CPU time since its start, of user and system."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    # --- what is done to it

    def pause(self) -> None:
        """As a machine that hangs: it holds its connections and hears nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """At once and without a farewell; returns when it is gone."""
        self._process.kill()
        self._process.wait(STOP_S)

    def terminate(self) -> None:
        """As Kubernetes ends a pod; returns at once."""
        self._process.terminate()

    async def ended(self, timeout_s: float = STOP_S) -> int:
        """Its exit status. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            while self.running:  # noqa: ASYNC110 - a thread that waits could not be cancelled
                await asyncio.sleep(0.05)
        return self._process.wait()

    def close(self) -> None:
        """End it, in order if it still can."""
        if self.running:
            self.resume()
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        if self.running:
            self._process.kill()
        self._process.wait()
        self._reader.join(5.0)
        assert self._process.stdout is not None
        self._process.stdout.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
