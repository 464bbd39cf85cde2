"""The platform as people install it, for tests that want the operator in its own image."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from e2e.cluster import Cluster
from e2e.operator.space import IMAGE_PREFIX, Space

ROOT = Path(__file__).parent.parent.parent
SYSTEM = "dynamo-system"
OPERATOR, WEBHOOK = "dynamo-operator", "dynamo-operator-webhook"
START_S = 180.0


class Platform:
    """Operator and webhook, two pods each, in the namespace `system`."""

    def __init__(self, cluster: Cluster) -> None:
        self.system = Space(cluster, SYSTEM)

    def leader(self) -> str:
        """The operator's pod that holds the lease; "" while there is none."""
        holder = self.system.get("lease", OPERATOR)["spec"].get("holderIdentity") or ""
        return str(holder.partition("_")[0])

    def kill_leader(self) -> None:
        """SIGKILL: nothing is handed over, and its lease has to run out. Its pod goes as well, so
        that another one leads then. On a cluster that isn't ours the pod goes by force, and the
        kubelet's SIGTERM lets it hand over."""
        leader, system = self.leader(), self.system
        if not system.cluster.is_foreign:
            system.cluster.kill_containers(leader, system.name)
        system.kubectl("delete", "pod", leader, "--grace-period=0", "--force")

    def is_available(self) -> bool:
        """Whether all of its pods are."""
        return all(
            self.system.get("deployment", name)["status"].get("availableReplicas", 0) == 2
            for name in (OPERATOR, WEBHOOK)
        )

    def story(self) -> str:
        """What there is of it, for people."""
        return "\n".join(
            self.system.kubectl(*command, check=False)
            for command in (
                ("get", "pods", "-o", "wide"),
                ("logs", f"deploy/{OPERATOR}", "--tail=40"),
                ("logs", f"deploy/{WEBHOOK}", "--tail=40"),
                ("get", "events"),
            )
        )


@contextlib.contextmanager
def installed(cluster: Cluster) -> Iterator[Platform]:
    """The platform, usable. One that was there before stays; else it is gone afterwards."""
    platform = Platform(cluster)
    was_there = platform.system.exists("deployment", OPERATOR)
    text = manifests()
    try:
        cluster.kubectl("apply", "-f", "-", input=text)
        platform.system.until(
            platform.is_available, "operator and webhook available", START_S, platform.story
        )
        yield platform
    finally:
        if not was_there:
            cluster.end_pods(SYSTEM)
            cluster.kubectl(
                *("delete", "-f", "-", "--ignore-not-found"), input=text, timeout=180.0, check=False
            )
            left = cluster.kubectl(
                *("get", "-f", "-", "--ignore-not-found", "-o", "name"), input=text
            ).stdout
            assert not left, f"uninstalling leaves {left}"


def manifests() -> str:
    """What `dynamo operator manifests` prints."""
    prefix = ("--image-prefix", IMAGE_PREFIX) if IMAGE_PREFIX else ()
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_cli.main", "operator", "manifests", *prefix],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return done.stdout
