"""Stands in for a cloud's load balancer: each Service of type LoadBalancer gets an address.

The address is the Service's own ClusterIP, which the machine reaches by route. `ipMode: Proxy`
keeps kube-proxy from claiming it a second time. Ends when the watch ends; the supervisor starts it
again.

Standard library only: `python balancer.py KUBECTL… KUBECONFIG`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

FIELDS = (
    "{.spec.type} {.metadata.namespace} {.metadata.name} {.spec.clusterIP} "
    "{.status.loadBalancer.ingress[0].ip}{'\\n'}"
)


def patch(line: str) -> tuple[str, str, str] | None:
    """Namespace, name and patch of a Service that lacks its address; None for any other.

    `line` is what `FIELDS` make of the Service.
    """
    kind, namespace, name, address, *has = line.split()
    if kind != "LoadBalancer" or has == [address]:
        return None
    ingress = [{"ip": address, "ipMode": "Proxy"}]
    return namespace, name, json.dumps({"status": {"loadBalancer": {"ingress": ingress}}})


def run(kubectl: Sequence[str]) -> None:
    """Give addresses until the watch ends."""
    watch = [*kubectl, "get", "services", "-A", "--watch", "-o", f"jsonpath={FIELDS}"]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as services:
        assert services.stdout is not None
        for line in services.stdout:
            if found := patch(line):
                namespace, name, change = found
                status = ("--subresource=status", "--type=merge", "-p", change)
                # A Service that is gone meanwhile is none to care for.
                subprocess.run(
                    [*kubectl, "-n", namespace, "patch", "service", name, *status], check=False
                )


if __name__ == "__main__":
    *program, kubeconfig = sys.argv[1:]
    run([*program, f"--kubeconfig={kubeconfig}"])
