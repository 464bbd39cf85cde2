"""A picker in a cluster: what it says while it can't list its workers, and how it is set up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest
from aiohttp import web
from dynamo_cli.frontend_command import accept_seconds
from dynamo_cli.main import app
from dynamo_epp.serving import Misconfigured, PickerSettings, ServingKvPicker, endpoint_source
from dynamo_runtime.discovery import Endpoint
from dynamo_runtime.lifecycle import Lifecycle
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from tests.runtime.kube_api import failure, serving

KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: c
contexts: [{{name: c, context: {{cluster: c, namespace: ns}}}}]
clusters: [{{name: c, cluster: {{server: "{url}"}}}}]
"""
SETTINGS = PickerSettings(discovery_backend="kubernetes", graph="g")


@pytest.fixture
def _root_logger() -> Iterator[None]:
    """The command sets up logging for its process; the tests go on in theirs."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


async def test_a_frontend_that_may_not_list_pods_says_so_and_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_runtime.kubernetes.informer.BACKOFF_S", (0.001, 0.005))
    reasons: list[str] = []
    said, may = asyncio.Event(), asyncio.Event()

    class Watched(Lifecycle):
        def set_not_ready(self, reason: str) -> None:
            super().set_not_ready(reason)
            reasons.append(reason)
            said.set()

    async with serving() as api:
        path = tmp_path / "kubeconfig"
        path.write_text(KUBECONFIG.format(url=api.url))
        monkeypatch.setenv("KUBECONFIG", str(path))
        api.put(
            "/api/v1/pods",
            {
                "metadata": {
                    "name": "w",
                    "namespace": "ns",
                    "labels": {
                        "nvidia.com/dynamo-graph-deployment-name": "g",
                        "nvidia.com/dynamo-component-class": "worker",
                        "nvidia.com/dynamo-component-type": "worker",
                    },
                },
                "spec": {
                    "containers": [
                        {"name": "main", "ports": [{"name": "http", "containerPort": 1}]}
                    ]
                },
                "status": {"podIP": "127.0.0.1"},
            },
        )

        async def forbid(_: web.Request) -> web.Response | None:
            return None if may.is_set() else failure(403, "Forbidden", "pods is forbidden: User x")

        api.interfere = forbid
        registry, published = CollectorRegistry(), list[Sequence[Endpoint]]()
        picker = ServingKvPicker(SETTINGS, Watched(), registry)
        starting = asyncio.create_task(picker.start(published.append))
        await asyncio.wait_for(said.wait(), 30)
        assert reasons == [
            "waiting for the first list of endpoints: needs a role that allows list and watch of "
            "pods in namespace ns: pods is forbidden: User x"
        ]
        assert registry.get_sample_value("dynamo_epp_discovery_current") == 0
        may.set()
        await asyncio.wait_for(starting, 30)
        assert [endpoint.hostport for endpoint in published[-1]] == ["127.0.0.1:1"]
        assert registry.get_sample_value("dynamo_epp_discovery_current") == 1
        await picker.stop()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Misconfigured, match="needs DYN_PARENT_DGD_K8S_NAME"):
        endpoint_source(PickerSettings(discovery_backend="kubernetes"))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(Misconfigured, match="no usable service account"):
        endpoint_source(SETTINGS)


@pytest.mark.usefixtures("_root_logger")
def test_the_command_takes_what_the_operator_renders() -> None:
    environment = {
        "DYN_DISCOVERY_BACKEND": "kubernetes",
        "DYN_PARENT_DGD_K8S_NAME": "g",
        "DYN_PARENT_DGD_K8S_NAMESPACE": "ns",
        "POD_NAMESPACE": "ns",
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "KUBECONFIG": "",
        "DYN_ENDPOINTS_FILE": "",
    }
    result = CliRunner(env=environment).invoke(app, ["frontend"])
    assert result.exit_code == 2
    assert "no usable service account" in result.stderr


@pytest.mark.parametrize(
    ("given", "backend", "seconds"),
    [(None, "kubernetes", 5.0), (None, "file", 0.0), (0.0, "kubernetes", 0.0), (2.0, "file", 2.0)],
)
def test_in_a_cluster_a_frontend_takes_requests_until_everybody_knows(
    given: float | None, backend: str, seconds: float
) -> None:
    assert accept_seconds(given, backend) == seconds


async def test_a_cluster_that_was_not_there_is_no_problem_any_more_once_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text("nonsense")
    monkeypatch.setenv("KUBECONFIG", str(path))
    problems: list[str] = []
    source = endpoint_source(SETTINGS, problems.append)
    assert [snapshot async for snapshot in source.snapshots()] == []
    assert problems[-1]
    async with serving() as api:
        path.write_text(KUBECONFIG.format(url=api.url))
        snapshots = source.snapshots()
        assert isinstance(snapshots, AsyncGenerator)
        async with aclosing(snapshots):
            assert await anext(snapshots) == ()
    assert problems[-1] == ""
