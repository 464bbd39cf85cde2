"""Secrets for images, found by the registry that they are for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.operator import graphs
from e2e.operator.operators import HostOperator
from e2e.operator.space import Json, Space, uids

EARLIER, LATER = "earlier", "later"
OURS, OTHERS = "registry-of-ours", "registry-of-others"
SERVERS = {OURS: "https://index.docker.io/v1/", OTHERS: "https://registry.test"}
"""Names without a registry, as this platform's are here, mean Docker's."""


@pytest.fixture
def before_secrets(space: Space) -> Iterator[Space]:
    """The namespace, and a graph that ran before there was any Secret."""
    space.apply(graph(EARLIER))
    space.wait_ready(EARLIER)
    yield space
    space.kubectl("delete", "dgd", EARLIER, LATER, "--ignore-not-found")
    space.kubectl("delete", "secret", *SERVERS, "--ignore-not-found")


def graph(name: str, **env: str) -> Json:
    return graphs.graph(name, graphs.frontend(), graphs.worker(1, **env))


def secrets_of(space: Space, name: str) -> set[tuple[str, ...]]:
    """The pull secrets of each of a graph's pods."""
    return {
        tuple(secret["name"] for secret in pod["spec"].get("imagePullSecrets") or ())
        for pod in space.pods(name)
    }


@pytest.mark.timeout(300)
def test_new_pods_get_the_secrets_of_their_registry(
    before_secrets: Space, operator: HostOperator
) -> None:
    space = before_secrets
    assert secrets_of(space, EARLIER) == {()}
    old = uids(space.pods(EARLIER))
    for name, server in SERVERS.items():
        space.kubectl(
            *("create", "secret", "docker-registry", name, f"--docker-server={server}"),
            *("--docker-username=e2e", "--docker-password=none"),
        )

    space.apply(graph(LATER))
    space.wait_ready(LATER)
    assert secrets_of(space, LATER) == {(OURS,)}

    # A graph that is reconciled once more keeps its templates, and so its pods.
    reconciles = operator.metric("controller_runtime_reconcile_total")
    writes = operator.metric("dynamo_operator_writes_total")
    space.annotate("dgd", EARLIER, "example.test/looked-at=again")
    space.until(
        lambda: operator.metric("controller_runtime_reconcile_total") > reconciles, "reconciled"
    )
    assert operator.metric("dynamo_operator_writes_total") == writes
    assert uids(space.pods(EARLIER, ending=True)) == old
    assert secrets_of(space, EARLIER) == {()}

    # Its author changes it: it is rendered as everything is now.
    space.apply(graph(EARLIER, GENERATION="2"))
    space.wait_ready(EARLIER)
    (worker,) = space.pods(EARLIER, "Worker")
    assert worker["spec"]["imagePullSecrets"] == [{"name": OURS}]
