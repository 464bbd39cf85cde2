"""The client over real sockets: paths, errors in the server's words, time limits, credentials."""

from __future__ import annotations

import asyncio
import importlib.util
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from dynamo_runtime.kubernetes import resources
from dynamo_runtime.kubernetes.access import (
    TOKEN_READ_EVERY_S,
    Access,
    KubeconfigAccess,
    NoCluster,
    PodAccess,
    access_from,
)
from dynamo_runtime.kubernetes.client import (
    ApiError,
    ApiUnreachable,
    KubernetesClient,
    namespace_in,
    resource_in,
)
from dynamo_runtime.kubernetes.resources import CRDS, DEPLOYMENTS, GRAPHS, PODS, Resource

from tests.runtime.kube_api import KubeApi, failure, serving

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "a"}}


@asynccontextmanager
async def connected(**options: Any) -> AsyncIterator[tuple[KubeApi, KubernetesClient]]:
    async with (
        serving() as api,
        KubernetesClient(Access(api.url), user_agent="test", **options) as client,
    ):
        yield api, client


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resource", "arguments", "path"),
    [
        (PODS, (), "/api/v1/pods"),
        (PODS, ("a",), "/api/v1/namespaces/a/pods"),
        (PODS, ("a", "p", "status"), "/api/v1/namespaces/a/pods/p/status"),
        (DEPLOYMENTS, ("a", "d"), "/apis/apps/v1/namespaces/a/deployments/d"),
        (CRDS, (None, "x"), "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/x"),
        (CRDS, ("ignored", "x"), "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/x"),
    ],
)
def test_paths(resource: Resource, arguments: tuple[str | None, ...], path: str) -> None:
    assert resource.path(*arguments) == path


def test_an_object_needs_its_namespace() -> None:
    with pytest.raises(ValueError, match="Pod 'p' is namespaced, but no namespace is given"):
        PODS.path(None, "p")


def test_manifests_are_found_by_version_and_kind() -> None:
    assert resources.of({"apiVersion": "apps/v1", "kind": "Deployment"}) is DEPLOYMENTS
    assert GRAPHS.full_name == "dynamographdeployments.nvidia.com"
    assert PODS.full_name == "pods"
    manifest = {"apiVersion": "v2", "kind": "Pod", "metadata": {"name": "p"}}
    with pytest.raises(resources.UnknownKind, match=r"apiVersion 'v2', kind 'Pod' \(of 'p'\)"):
        resources.of(manifest)


@pytest.mark.parametrize(
    ("path", "resource", "namespace"),
    [
        ("/api/v1/pods", "pods", ""),
        ("/api/v1/namespaces/a", "namespaces", "a"),
        ("/api/v1/namespaces/a/pods/p", "pods", "a"),
        ("/apis/apps/v1/namespaces/a/deployments/d/status", "deployments/status", "a"),
        ("/apis/apps/v1", "other", ""),
        ("/version", "other", ""),
    ],
)
def test_metrics_know_the_resource_and_no_names(path: str, resource: str, namespace: str) -> None:
    assert resource_in(path) == resource
    assert namespace_in(path) == namespace


# --- requests -------------------------------------------------------------------------------------


async def test_objects_are_written_read_and_deleted() -> None:
    told: list[tuple[str, str, int]] = []
    options = {"on_request": lambda *request: told.append(request[:3])}
    async with connected(**options) as (api, client):
        created = await client.create(POD)
        assert await client.get(PODS.path("a", "p")) == created
        with pytest.raises(ApiError) as again:
            await client.create(POD)
        assert (again.value.status, again.value.reason) == (409, "AlreadyExists")
        labelled = {**POD, "metadata": {**POD["metadata"], "labels": {"x": "y"}}}
        applied = await client.apply(labelled, field_manager="m")
        assert applied["metadata"]["labels"] == {"x": "y"}
        sent = api.seen[-1]
        assert sent.content_type == "application/apply-patch+yaml"
        assert dict(sent.query) == {"fieldManager": "m", "force": "true"}
        patched = await client.merge_patch(PODS.path_of(POD), {"metadata": {"labels": None}})
        assert "labels" not in patched["metadata"]
        operations = [
            {"op": "test", "path": "/metadata/name", "value": "p"},
            {"op": "add", "path": "/spec", "value": {"nodeName": "n"}},
        ]
        patched = await client.json_patch(PODS.path_of(POD), operations)
        assert patched["spec"] == {"nodeName": "n"}
        with pytest.raises(ApiError, match="preconditions do not hold"):
            await client.delete(PODS.path_of(POD), uid="another's")
        with pytest.raises(ApiError, match=r"modified \(409 Conflict\)"):
            await client.replace(PODS.path_of(POD), created)
        metadata = patched["metadata"]
        await client.delete(
            PODS.path_of(POD), uid=metadata["uid"], resource_version=metadata["resourceVersion"]
        )
        assert not api.objects
    assert told[0] == ("POST", "pods", 201)
    assert told[-1] == ("DELETE", "pods", 200)


async def test_errors_are_the_servers_own_words() -> None:
    async with connected() as (api, client):
        with pytest.raises(ApiError, match='pods "p" not found') as absent:
            await client.get(PODS.path("a", "p"))
        assert (absent.value.status, absent.value.reason) == (404, "NotFound")
        assert absent.value.body["kind"] == "Status"
        api.failures.append(lambda _: web.Response(status=502, text="<html>bad gateway"))
        with pytest.raises(ApiError, match="<html>bad gateway") as proxied:
            await client.get("/api/v1/pods")
        assert (proxied.value.status, proxied.value.reason) == (502, "Bad Gateway")
        api.failures.append(lambda _: web.Response(text="ok"))
        with pytest.raises(ApiError, match="GET /readyz: JSON is malformed"):
            await client.get("/readyz")


async def test_a_server_that_asks_for_patience_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_runtime.kubernetes.client.WAIT_LIMIT_S", 0.001)
    async with connected() as (api, client):
        api.fail(429, headers={"Retry-After": "7"})
        api.fail(503, headers={"Retry-After": "1"})
        await client.get("/api/v1/pods")
        assert len(api.requests) == 3
        api.fail(429, times=3)
        with pytest.raises(ApiError, match="429"):
            await client.get("/api/v1/pods")
        api.requests.clear()
        api.fail(503)
        with pytest.raises(ApiError, match="503"):
            await client.get("/api/v1/pods")
        assert len(api.requests) == 1, "who did not ask for patience is not asked again"


async def test_no_answer_is_an_error_of_its_own() -> None:
    told: list[int] = []
    async with connected(on_request=lambda *request: told.append(request[2])) as (api, client):
        api.failures.append(lambda request: request.transport.abort())  # type: ignore[union-attr]
        with pytest.raises(ApiUnreachable, match="POST /api/v1/namespaces/a/pods"):
            await client.create(POD)

        never = asyncio.Event()

        async def hang(_: web.Request) -> web.Response:
            await never.wait()
            return web.Response()

        api.interfere = hang
        with pytest.raises(ApiUnreachable, match="did not answer GET /version in time") as error:
            await client.request("GET", "/version", timeout_s=0.05)
        assert error.value.status == 0
        never.set()
    assert told == [0, 0]
    async with KubernetesClient(Access("http://127.0.0.1:1"), user_agent="t") as client:
        with pytest.raises(ApiUnreachable, match=r"http://127.0.0.1:1: GET /version: .*onnect"):
            await client.get("/version")


async def test_warnings_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    warning = '299 - "nvidia.com/v1alpha1 is \\"old\\""'
    async with connected() as (api, client):
        for _ in range(2):
            api.failures.append(lambda _: web.json_response({}, headers={"Warning": warning}))
            await client.get("/version")
    assert caplog.text.count('the API server warns: nvidia.com/v1alpha1 is "old"') == 1


async def test_a_fence_keeps_writes_from_being_sent() -> None:
    class NotNow(Exception):
        pass

    def fence(namespace: str) -> None:
        asked.add(namespace)
        raise NotNow

    asked: set[str] = set()
    path = PODS.path("a", "p")
    writes: list[Callable[[KubernetesClient], Awaitable[Any]]] = [
        lambda client: client.create(POD),
        lambda client: client.apply(POD, field_manager="test"),
        lambda client: client.replace(path, POD),
        lambda client: client.merge_patch(path, {}),
        lambda client: client.json_patch(path, []),
        lambda client: client.delete(path),
    ]
    async with connected() as (api, client):
        await client.create(POD)
        client.fence = fence
        for write in writes:
            with pytest.raises(NotNow):
                await write(client)
            assert (await client.get(path))["metadata"]["name"] == "p"
        assert {method for method, _ in api.requests[1:]} == {"GET"}
        assert asked == {"a"}
        client.fence = None
        await client.delete(path)


async def test_a_fence_is_asked_again_before_each_attempt() -> None:
    class NotNow(Exception):
        pass

    asked: list[None] = []

    def fence(namespace: str) -> None:
        asked.append(None)
        if len(asked) == 2:
            raise NotNow

    async with connected() as (api, client):
        api.fail(429, headers={"Retry-After": "0"})
        client.fence = fence
        with pytest.raises(NotNow):
            await client.create(POD)
        assert len(asked) == 2
        assert len(api.requests) == 1
        assert api.objects == {}


async def test_watch_lines_have_any_length() -> None:
    async with connected() as (api, client):
        large = {**POD, "spec": {"value": "x" * 300_000}}
        api.put("/api/v1/pods", large)
        api.put("/api/v1/pods", POD)
        params = {"resourceVersion": "1000"}
        async with aclosing(client.watch("/api/v1/pods", params, timeout_s=5)) as events:
            first, second = await anext(events), await anext(events)
            assert (first["type"], second["type"]) == ("ADDED", "MODIFIED")
            assert first["object"]["spec"] == large["spec"]
            api.end_watches()
            assert [event async for event in events] == []
        with pytest.raises(ApiUnreachable, match="in time"):
            async for _ in client.watch(
                "/api/v1/pods", {"resourceVersion": "9999"}, timeout_s=0.05
            ):
                pass


# --- credentials ----------------------------------------------------------------------------------


class Rotating(Access):
    """Token "1" until renewed, then "2", …"""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.token = 1

    def authorization(self) -> str:
        return f"Bearer {self.token}"

    async def renew(self) -> None:
        self.token += 1


async def test_a_401_is_answered_with_renewed_credentials() -> None:
    def wants(token: str) -> Any:
        def check(request: web.Request) -> web.Response | None:
            given = request.headers["Authorization"]
            return None if given == f"Bearer {token}" else failure(401, "Unauthorized", "no")

        return check

    async with (
        serving() as api,
        KubernetesClient(Rotating(api.url), user_agent="test") as client,
    ):
        api.failures += [wants("2"), wants("2")]
        await client.get("/api/v1/pods")
        api.failures += [wants("9"), wants("9")]
        with pytest.raises(ApiError, match="401"):
            await client.get("/api/v1/pods")
        assert len(api.requests) == 4
        assert api.seen[0].headers["User-Agent"] == "test"


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """A service account's folder."""
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "namespace").write_text("team-a")
    (tmp_path / "ca.crt").write_text(CERTIFICATE)
    return tmp_path


def test_in_a_pod_the_token_is_read_again(account: Path) -> None:
    now = [1000.0]
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    access = PodAccess(environment, account, clock=lambda: now[0])
    assert (access.url, access.namespace) == ("https://[fd00::1]:443", "team-a")
    assert access.tls is not None
    assert access.tls.verify_mode is ssl.CERT_REQUIRED
    assert access.authorization() == "Bearer first"
    (account / "token").write_text("second")
    assert access.authorization() == "Bearer first"
    now[0] += TOKEN_READ_EVERY_S
    assert access.authorization() == "Bearer second"
    (account / "token").unlink()
    now[0] += TOKEN_READ_EVERY_S
    assert access.authorization() == "Bearer second", "it is being replaced"


async def test_in_a_pod_a_401_reads_the_token_at_once(account: Path) -> None:
    access = PodAccess({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, account)
    (account / "token").write_text("second")
    await access.renew()
    assert access.authorization() == "Bearer second"


def test_what_is_missing_in_a_pod_is_named(account: Path) -> None:
    with pytest.raises(NoCluster, match="KUBERNETES_SERVICE_HOST is not set"):
        PodAccess({}, account)
    (account / "token").unlink()
    with pytest.raises(NoCluster, match=r"token'; does its spec set automountServiceAccountToken"):
        PodAccess({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, account)


CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdDCCARugAwIBAgIUdF/fYUT5TBdcy0qI7Q/hmKQrQmwwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjQwNjEyMjNaGA8yMTI2MTAzMTA2MTIy
M1owDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABD1O
Qj7twqco5U4N0KTjfqC06zgxkVYuWVkEulivjUbNrOQmFQG68nQrjyrc7wf/fuEg
jjSPlgdxH5omnYQP4cOjUzBRMB0GA1UdDgQWBBR/8VCnBGSxLSGMW+wQI/FA1/J8
izAfBgNVHSMEGDAWgBR/8VCnBGSxLSGMW+wQI/FA1/J8izAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0cAMEQCICbGHGwp73pFHejEfcOrAnkRr1mpKp6+tAce
/g1WmIltAiAE8ijzKSbeU1vZLgZEPF515qubRkPvcFSv9fvnweMIXw==
-----END CERTIFICATE-----
"""
KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: one
contexts:
- {name: one, context: {cluster: here, user: me, namespace: team-b}}
- {name: two, context: {cluster: here, user: plugin}}
clusters:
- {name: here, cluster: {server: "http://127.0.0.1:1/prefix/"}}
users:
- {name: me, user: {token: secret}}
- name: plugin
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1
      command: PLUGIN
"""


async def test_kubeconfig_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text(
        "#!/bin/sh\n"
        f"echo x >> {tmp_path}/runs\n"
        f"n=$(wc -l < {tmp_path}/runs)\n"
        'echo "{\\"apiVersion\\": \\"client.authentication.k8s.io/v1\\",'
        '\\"kind\\": \\"ExecCredential\\", \\"status\\": {\\"token\\": \\"run-$n\\"}}"\n'
    )
    plugin.chmod(0o755)
    path = tmp_path / "config"
    path.write_text(KUBECONFIG.replace("PLUGIN", str(plugin)))

    monkeypatch.setenv("KUBECONFIG", str(path))
    access = await access_from({"KUBECONFIG": str(path), "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert (access.url, access.namespace) == ("http://127.0.0.1:1/prefix", "team-b")
    assert access.authorization() == "Bearer secret"

    access = await access_from({}, kubeconfig=path, context="two")
    assert access.namespace == "default"
    assert access.authorization() == "Bearer run-1"
    await access.renew()
    assert access.authorization() == "Bearer run-2"

    with pytest.raises(NoCluster, match=f"{path}: .*name three in .*contexts"):
        await KubeconfigAccess.load(path, "three")
    path.write_text("{")
    with pytest.raises(NoCluster, match=str(path)):
        await KubeconfigAccess.load(path)
    with pytest.raises(NoCluster, match="nowhere: no such kubeconfig file"):
        await KubeconfigAccess.load(tmp_path / "nowhere")


def test_importing_the_client_costs_no_kubernetes_library() -> None:
    assert importlib.util.find_spec("kubernetes_asyncio")
    program = (
        "import sys, dynamo_runtime.discovery, dynamo_runtime.kubernetes.lease;"
        "print([name for name in sys.modules if name.startswith('kubernetes_asyncio')])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert said.stdout.strip() == b"[]"
