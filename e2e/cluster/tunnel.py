"""A way to pods and Services of a cluster whose addresses this machine does not reach."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from e2e.cluster.cluster import Cluster, ClusterError
from e2e.cluster.progress import wait_for

START_S = 30.0


class Tunnel:
    """`kubectl port-forward` to a port of `target` ("pod/NAME", "service/NAME").

    To a Service it leads to one of its pods, and ends with that pod.
    """

    def __init__(self, cluster: Cluster, namespace: str, target: str, port: int) -> None:
        """Returns when it is there. Raises `ClusterError` with what kubectl said."""
        self._log = tempfile.NamedTemporaryFile(prefix="tunnel-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                *(*cluster.kubectl_command(), "-n", namespace),
                *("port-forward", "--address", "127.0.0.1", target, f":{port}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "KUBECONFIG": str(cluster.kubeconfig)},
        )
        try:
            wait_for(f"tunnel to {target}", self._address, START_S)
            self.address = self._address()
        except BaseException:
            self.close()
            raise

    def _address(self) -> str:
        said = Path(self._log.name).read_text()
        if found := re.search(r"Forwarding from (127\.0\.0\.1:[0-9]+)", said):
            return found[1]
        if self._process.poll() is not None:
            raise ClusterError(f"kubectl port-forward: {said.strip()}")
        return ""

    def close(self) -> None:
        """Once is enough."""
        if self._log.closed:
            return
        self._process.terminate()
        self._process.wait()
        self._log.close()
