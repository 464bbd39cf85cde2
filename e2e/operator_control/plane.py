"""A control plane of a test's own, on loopback: outages and thousands of objects disturb nobody.

Its API server keeps an audit log of what the operators ask, each under an account of its own. So a
test counts requests where they arrive and knows which operator wrote, whatever that one says.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_runtime.kubernetes.client import KubernetesClient

from e2e.cluster import settings
from e2e.cluster.cluster import Cluster
from e2e.cluster.settings import Layout

SYSTEM = "ctl-system"
"""Namespace of the operators' accounts and leases."""
ACCOUNTS = ("alpha", "beta", "gamma")
START_S = 180.0
"""On a machine that does much else."""
WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})

_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {
            "level": "Metadata",
            "users": [f"system:serviceaccount:{SYSTEM}:{account}" for account in ACCOUNTS],
        },
        {"level": "None"},
    ],
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request of an operator, as the API server's audit log has it."""

    account: str
    verb: str
    resource: str
    """`deployments`, `dynamographdeployments/status`; "" if it is of no object."""
    namespace: str
    name: str
    code: int
    at: str
    """When it came; RFC 3339 with microseconds, so that texts compare as times."""

    @property
    def wrote(self) -> bool:
        """Whether it changed, or may have changed, an object; leases are no object of a graph."""
        return self.verb in WRITES and self.resource != "leases" and self.code < 400


class Plane:
    """One control plane below `folder`. `up` and `down` as for any cluster."""

    def __init__(self, folder: Path) -> None:
        policy = folder / "audit.yaml"
        policy.write_text(json.dumps(_POLICY))
        self._log = folder / "audit.log"
        self._folder = folder
        self.cluster = Cluster(
            Layout(settings.layout().root, folder / "state"),
            {},
            with_node=False,
            apiserver_flags=(
                f"--audit-policy-file={policy}",
                f"--audit-log-path={self._log}",
                # Operators that start and stop all the time are no reason to make anybody wait.
                "--max-requests-inflight=1000",
                "--max-mutating-requests-inflight=500",
            ),
        )

    def up(self) -> None:
        self.cluster.up()

    def down(self) -> None:
        self.cluster.down()

    def lose_apiserver(self) -> None:
        """Kill the API server. The parts that play nodes and their pods stop with it: they would
        take the silence for dead nodes, which would make this a test of something else."""
        for part in ("kwok", "controller-manager", "apiserver"):
            self.cluster.stop_component(part)

    def restore_apiserver(self) -> None:
        """Bring it back; returns when it is ready."""
        self.cluster.start_apiserver(START_S)
        for part in ("kwok", "controller-manager"):
            self.cluster.start_component(part)

    async def client(self, account: str = "") -> KubernetesClient:
        """As an operator's account, or as the administrator."""
        kubeconfig = self.kubeconfig(account) if account else self.cluster.kubeconfig
        return await KubernetesClient.from_environment(kubeconfig=kubeconfig, user_agent="e2e")

    def kubeconfig(self, account: str) -> Path:
        """The kubeconfig file of an operator's account."""
        return self._folder / f"{account}.kubeconfig"

    async def make_accounts(self, api: KubernetesClient) -> None:
        """The operators' accounts, with all rights, and their kubeconfig files."""
        await api.apply(_named("v1", "Namespace", SYSTEM), field_manager="e2e")
        binding = {
            **_named("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", SYSTEM),
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "cluster-admin",
            },
            "subjects": [
                {"kind": "ServiceAccount", "name": account, "namespace": SYSTEM}
                for account in ACCOUNTS
            ],
        }
        root = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
        await api.request("POST", root, body=binding)
        admin = json.loads(self._kubeconfig_as_json())
        for account in ACCOUNTS:
            body = _named("v1", "ServiceAccount", account, SYSTEM)
            await api.apply(body, field_manager="e2e")
            answer = await api.request(
                "POST",
                f"/api/v1/namespaces/{SYSTEM}/serviceaccounts/{account}/token",
                body={
                    "apiVersion": "authentication.k8s.io/v1",
                    "kind": "TokenRequest",
                    "spec": {"expirationSeconds": 24 * 3600},
                },
            )
            user = {"name": admin["users"][0]["name"], "user": {"token": answer["status"]["token"]}}
            self.kubeconfig(account).write_text(json.dumps({**admin, "users": [user]}))

    def _kubeconfig_as_json(self) -> str:
        return self.cluster.kubectl("config", "view", "--raw", "--flatten", "-o", "json").stdout

    # --- what operators asked

    def mark(self) -> int:
        """Now, as a place in the audit log."""
        return self._log.stat().st_size if self._log.exists() else 0

    def requests(self, since: int = 0) -> list[Request]:
        """What the operators asked since a `mark`, oldest first; watches when they ended."""
        return list(self._requests(since))

    def writes(self, since: int = 0, namespace: str | None = None) -> list[Request]:
        """Of these, what changed objects of graphs, in one namespace or all."""
        return [
            request
            for request in self._requests(since)
            if request.wrote and namespace in (None, request.namespace)
        ]

    def _requests(self, since: int) -> Iterator[Request]:
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(since)
            for line in file:
                if line.endswith(b"\n"):
                    yield _request(json.loads(line))


def _request(entry: dict[str, Any]) -> Request:
    about = entry.get("objectRef") or {}
    resource, sub = about.get("resource", ""), about.get("subresource", "")
    return Request(
        account=entry["user"]["username"].rpartition(":")[2],
        verb=entry["verb"],
        resource=f"{resource}/{sub}" if sub else resource,
        namespace=about.get("namespace", ""),
        name=about.get("name", ""),
        code=int((entry.get("responseStatus") or {}).get("code", 0)),
        at=entry["requestReceivedTimestamp"],
    )


def told(requests: list[Request]) -> str:
    """Requests by kind, for messages: `3 patch deployments, 1 create events`."""
    counts = Counter(f"{request.verb} {request.resource}" for request in requests)
    return ", ".join(f"{count} {what}" for what, count in counts.most_common()) or "none"


def _named(api_version: str, kind: str, name: str, namespace: str = "") -> dict[str, Any]:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}
