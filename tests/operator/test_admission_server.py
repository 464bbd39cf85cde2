"""The webhook as the API server meets it: TLS on loopback, certificates, bundles, reviews."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from dynamo_crds.generate import KINDS, WebhookService, definition
from dynamo_operator.admission.certificates import SystemRandomness, renewed, to_files
from dynamo_operator.admission.dry_run import dry_run
from dynamo_operator.admission.keeper import FileKeeper, NoCertificate, SecretKeeper
from dynamo_operator.admission.policy import judge
from dynamo_operator.admission.review import Request
from dynamo_operator.admission.scope import holds
from dynamo_operator.admission.server import Rules
from dynamo_operator.admission.webhook import Webhook, WebhookSettings, run_webhook
from dynamo_operator.admission.wording import Wording
from dynamo_operator.install.crds import ForeignCrds
from dynamo_operator.install.manifests import webhook_configuration
from dynamo_operator.install.settings import CERTIFICATE
from dynamo_operator.marker import MARKER
from dynamo_operator.render import Platform
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from dynamo_runtime.kubernetes.lease import Observation
from dynamo_runtime.lifecycle import Lifecycle
from prometheus_client import CollectorRegistry

from tests.runtime.kube_api import KubeApi, serving

Json = dict[str, Any]

SYSTEM = "dynamo-system"
HOST = f"dynamo-operator-webhook.{SYSTEM}.svc"
SECRETS = "/api/v1/secrets"
LEASES = "/apis/coordination.k8s.io/v1/leases"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
HOOKS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
NOW = datetime.now(UTC)
"""TLS itself knows only the machine's clock."""
SETTINGS = WebhookSettings(
    Rules(Platform(image_tag="test")),
    SYSTEM,
    names=("127.0.0.1",),
    host="127.0.0.1",
    port=0,
    status_host="127.0.0.1",
    status_port=0,
    drain_accept_s=0.0,
)


@pytest.fixture
async def api() -> AsyncIterator[KubeApi]:
    async with serving() as api:
        yield api


@pytest.fixture
async def client(api: KubeApi) -> AsyncIterator[KubernetesClient]:
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        yield client


def install(api: KubeApi) -> None:
    """What `kubectl apply` has put into the cluster before the webhook runs."""
    api.put(HOOKS, webhook_configuration("dynamo-operator", SYSTEM))
    for kind in KINDS:
        api.put(CRDS, definition(kind, WebhookService()))


def bundles(api: KubeApi) -> set[bytes]:
    """Every CA bundle in the cluster; b"" where one is missing."""
    (hooks,) = [item for key, item in api.objects.items() if key[0] == HOOKS]
    crds = [
        item["spec"]["conversion"]["webhook"] for k, item in api.objects.items() if k[0] == CRDS
    ]
    clients = [client["clientConfig"] for client in [*hooks["webhooks"], *crds]]
    return {base64.b64decode(client.get("caBundle", "")) for client in clients}


class Hook:
    """A running webhook and the way to call it as the API server does."""

    def __init__(
        self, api: KubeApi, client: KubernetesClient, settings: WebhookSettings = SETTINGS
    ) -> None:
        self.lifecycle = Lifecycle()
        self.registry = CollectorRegistry()
        self.now = NOW
        self._api = api
        self.webhook = Webhook(settings, client, self.lifecycle, self.registry, lambda: self.now)

    async def post(self, path: str, body: Any) -> Any:
        (bundle,) = bundles(self._api)
        trust = ssl.create_default_context(cadata=bundle.decode())
        url = f"https://127.0.0.1:{self.webhook.server.port}{path}"
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json=body, ssl=trust, server_hostname=HOST) as response,
        ):
            if response.content_type != "application/json":
                return response.status
            return (await response.json())["response"]

    async def validate(self, manifest: Json, old: Json | None = None) -> Any:
        request = {
            "uid": "1",
            "kind": {"kind": manifest["kind"]},
            "operation": "UPDATE" if old else "CREATE",
            "namespace": "team",
            "object": manifest,
            "oldObject": old,
        }
        version = "admission.k8s.io/v1"
        review = {"apiVersion": version, "kind": "AdmissionReview", "request": request}
        return await self.post("/validate", review)

    def counted(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"dynamo_operator_webhook_{name}", labels)


@pytest.fixture
async def hook(api: KubeApi, client: KubernetesClient) -> AsyncIterator[Hook]:
    hook = Hook(api, client)
    yield hook
    await hook.webhook.server.stop()


def graph(version: str = "v1beta1", **component: Any) -> Json:
    containers = [{"name": "main", "image": "x"}]
    template = {"spec": {"containers": containers}}
    worker = {"name": "Worker", "type": "worker", "podTemplate": template, **component}
    return {
        "apiVersion": f"nvidia.com/{version}",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "chat", "namespace": "team"},
        "spec": {"components": [worker]},
    }


# --- readiness and certificates -------------------------------------------------------------------


async def test_ready_once_it_serves_and_is_trusted(api: KubeApi, hook: Hook) -> None:
    assert not await hook.webhook.step()
    assert hook.lifecycle.reason == "ValidatingWebhookConfiguration dynamo-operator does not exist"
    install(api)
    assert await hook.webhook.step()
    assert hook.lifecycle.ready
    assert (await hook.validate(graph()))["allowed"]


async def test_dynamos_crds_are_left_alone(api: KubeApi, hook: Hook) -> None:
    install(api)
    crd = definition(KINDS[0], WebhookService())
    crd["metadata"]["annotations"]["controller-gen.kubebuilder.io/version"] = "v0.17.3"
    before = api.put(CRDS, crd)
    assert not await hook.webhook.step()
    assert hook.lifecycle.reason == (
        "CustomResourceDefinition dynamographdeployments.nvidia.com is not ours (dynamo)"
    )
    assert api.objects[CRDS, "", KINDS[0].crd] == before


async def test_two_replicas_agree_on_one_secret(api: KubeApi, client: KubernetesClient) -> None:
    keepers = [SecretKeeper(client, SYSTEM, [HOST]) for _ in range(3)]
    served = await asyncio.gather(*(keeper.current(NOW) for keeper in keepers))
    assert len(set(served)) == 1
    later = NOW + timedelta(days=61)
    renewed = await asyncio.gather(*(keeper.current(later) for keeper in keepers))
    assert len(set(renewed)) == 1
    assert renewed[0].chain != served[0].chain
    assert renewed[0].bundle == served[0].bundle


async def test_a_deleted_or_spoilt_secret_comes_back_as_it_was(
    api: KubeApi, client: KubernetesClient
) -> None:
    keeper = SecretKeeper(client, SYSTEM, [HOST])
    served = await keeper.current(NOW)
    secret = api.delete(SECRETS, SYSTEM, CERTIFICATE)
    assert await keeper.current(NOW) == served
    api.put(SECRETS, {**secret, "data": {"tls.crt": "no base64", "tls.key": ""}})
    assert await keeper.current(NOW) == served
    assert await SecretKeeper(client, SYSTEM, [HOST]).current(NOW) == served


async def test_no_request_fails_while_everything_rotates(api: KubeApi, hook: Hook) -> None:
    """Five years, looking every 20 days: several certificates and authorities."""
    install(api)
    assert await hook.webhook.step()
    shown = {bundles(api).pop()}
    for days in range(0, 5 * 365, 20):
        hook.now = NOW - timedelta(days=1) + timedelta(days=days)
        assert await hook.webhook.step(), hook.lifecycle.reason
        shown |= bundles(api)
    assert len(shown) > 2


async def test_given_files_are_served_and_exchanged(
    api: KubeApi, client: KubernetesClient, tmp_path: Path
) -> None:
    install(api)

    def write(made: datetime = NOW - timedelta(days=1)) -> bytes:
        material = renewed(None, [HOST], made, SystemRandomness())
        for name, content in to_files(material).items():
            (tmp_path / name).write_bytes(content)
        return material.bundle

    hook = Hook(api, client, replace(SETTINGS, certificates=tmp_path))
    try:
        assert not await hook.webhook.step()
        assert hook.lifecycle.reason == f"{tmp_path}/tls.crt: No such file or directory"
        bundle = write()
        assert await hook.webhook.step()
        assert bundles(api) == {bundle}
        assert (await hook.validate(graph()))["allowed"]
        before = hook.counted("certificate_expiry_seconds")
        bundle = write(NOW)
        assert await hook.webhook.step()
        assert all(bundle in each for each in bundles(api))
        assert hook.counted("certificate_expiry_seconds") == before, "first it has to be known"
        assert await hook.webhook.step()
        assert hook.counted("certificate_expiry_seconds") != before
        assert (await hook.validate(graph()))["allowed"]
    finally:
        await hook.webhook.server.stop()
    with pytest.raises(NoCertificate, match=r"tls\.crt expired"):
        await FileKeeper(tmp_path).current(NOW + timedelta(days=91))
    (tmp_path / "ca.crt").write_bytes(b"?")
    with pytest.raises(NoCertificate, match=r"ca\.crt: no certificates"):
        await FileKeeper(tmp_path).current(NOW)
    (tmp_path / "tls.crt").write_bytes(b"?")
    with pytest.raises(NoCertificate, match=r"tls\.crt"):
        await FileKeeper(tmp_path).current(NOW)


async def test_an_api_server_that_is_down_takes_no_readiness_away(api: KubeApi, hook: Hook) -> None:
    install(api)
    assert await hook.webhook.step()
    api.fail(500, times=1)
    assert not await hook.webhook.step()
    assert hook.lifecycle.ready
    api.fail(500, times=1)
    hook.now += timedelta(days=91)
    assert not await hook.webhook.step()
    assert not hook.lifecycle.ready
    assert await hook.webhook.step()
    assert hook.lifecycle.ready


async def test_the_process_from_start_to_drain(api: KubeApi, client: KubernetesClient) -> None:
    api.put(HOOKS, webhook_configuration("dynamo-operator", SYSTEM))
    lifecycle = Lifecycle()
    settings = replace(SETTINGS, installs_crds=True)
    running = asyncio.create_task(run_webhook(settings, client, lifecycle))
    async with asyncio.timeout(20):
        await ready_or_over(lifecycle, running)
        assert len(bundles(api)) == 1
        lifecycle.request_stop("test")
        assert await running == 0


async def ready_or_over(lifecycle: Lifecycle, running: asyncio.Task[int]) -> None:
    """Looks at every turn of the loop, because readiness is a state and no event."""
    while not lifecycle.ready and not running.done():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_the_process_ends_where_crds_are_dynamos(
    api: KubeApi, client: KubernetesClient
) -> None:
    install(api)
    crd = definition(KINDS[1], None)
    del crd["metadata"]["labels"]
    api.put(CRDS, crd)
    settings = replace(SETTINGS, installs_crds=True)
    assert await run_webhook(settings, client, Lifecycle()) == 1
    with pytest.raises(ForeignCrds, match=KINDS[1].crd):
        await Webhook(settings, client, Lifecycle(), CollectorRegistry()).step()


# --- reviews --------------------------------------------------------------------------------------


@pytest.fixture
async def ready(api: KubeApi, hook: Hook) -> Hook:
    install(api)
    assert await hook.webhook.step()
    return hook


async def test_what_is_let_in_has_been_tried(api: KubeApi, ready: Hook) -> None:
    response = await ready.validate(graph())
    assert response["allowed"]
    tried = [r for r in api.seen if r.method == "POST" and r.query.get("dryRun") == "All"]
    assert {r.path for r in tried} == {
        "/apis/apps/v1/namespaces/team/deployments",
        "/api/v1/namespaces/team/services",
    }
    assert not [key for key in api.objects if key[1] == "team"]
    labels = {"resource_type": "DynamoGraphDeployment", "operation": "CREATE"}
    assert ready.counted("requests_total", **labels, result="allowed") == 1
    assert ready.counted("duration_seconds_count", **labels) == 1


async def test_the_api_servers_words_deny(api: KubeApi, ready: Hook) -> None:
    def refuse(request: web.Request) -> web.Response | None:
        if not request.path.endswith("/deployments"):
            return None
        cause = {"field": "spec.template.spec.containers[0].image", "message": "Invalid value: no"}
        body = {"kind": "Status", "code": 422, "message": "x", "details": {"causes": [cause]}}
        return web.json_response(body, status=422)

    api.failures += [refuse] * 5
    response = await ready.validate(graph())
    assert not response["allowed"]
    assert response["status"]["message"] == (
        "spec.components[0].podTemplate.spec.containers[0].image: Invalid value: no "
        "(component Worker)"
    )
    labels = {"resource_type": "DynamoGraphDeployment", "operation": "CREATE"}
    assert ready.counted("denials_total", **labels, reason="dry_run") == 1
    assert ready.counted("requests_total", **labels, result="denied") == 1


async def test_an_api_server_in_trouble_denies_nothing(api: KubeApi, ready: Hook) -> None:
    api.fail(503, times=10)
    response = await ready.validate(graph())
    assert response["allowed"]
    assert any("could not be tried: injected" in line for line in response["warnings"])


async def test_a_dry_run_ends_in_time(api: KubeApi, client: KubernetesClient) -> None:
    verdict = judge(
        Request("1", "CREATE", "DynamoGraphDeployment", "team", graph()), Platform(image_tag="t")
    )
    outcome = await dry_run(client, verdict.trials, Wording("nvidia.com/v1beta1"), 0.0)
    assert outcome.denials == ()
    assert outcome.warnings == ("2 of 2 rendered objects were not tried within 0 s",)


async def test_a_namespace_with_an_operator_of_its_own_is_let_pass(
    api: KubeApi, ready: Hook
) -> None:
    wrong = graph(replicas=-1)
    assert not (await ready.validate(wrong))["allowed"]
    lease = marker(ready.now)
    api.put(LEASES, lease)
    assert await ready.validate(wrong) == {"uid": "1", "allowed": True}
    ready.now += timedelta(seconds=31)
    assert not (await ready.validate(wrong))["allowed"]


def marker(renewed: datetime) -> Json:
    return {
        "metadata": {"name": MARKER, "namespace": "team"},
        "spec": {
            "holderIdentity": "operator-team",
            "leaseDurationSeconds": 30,
            "renewTime": renewed.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        },
    }


def test_a_mark_holds_while_it_moves_whatever_its_clock_says() -> None:
    for behind in (timedelta(minutes=4), timedelta(0), timedelta(hours=-3)):
        seen = Observation(marker(NOW - behind), NOW.timestamp())
        assert holds(seen, NOW + timedelta(seconds=29))
        assert not holds(seen, NOW + timedelta(seconds=30))
    for spoilt in ({}, {"holderIdentity": ""}, {"renewTime": None}, {"renewTime": "yesterday"}):
        lease = marker(NOW)
        lease["spec"] = {**lease["spec"], **spoilt} if spoilt else {}
        assert not holds(Observation(lease, NOW.timestamp()), NOW)


async def test_a_mark_that_was_left_behind_is_nobodys(api: KubeApi, ready: Hook) -> None:
    """Also at the first look, before anybody has seen that it does not move."""
    wrong = graph(replicas=-1)
    api.put(LEASES, marker(ready.now - timedelta(minutes=6)))
    assert not (await ready.validate(wrong))["allowed"]
    api.put(LEASES, marker(ready.now))
    assert (await ready.validate(wrong))["allowed"]
    api.delete(LEASES, "team", MARKER)
    assert not (await ready.validate(wrong))["allowed"]


async def test_objects_are_converted_both_ways(ready: Hook) -> None:
    objects = [graph(replicas=i) for i in range(200)]
    review = conversion_review(objects, "nvidia.com/v1alpha1")
    response = await ready.post("/convert", review)
    assert response["result"] == {"status": "Success"}
    there = response["convertedObjects"]
    assert [o["spec"]["services"]["Worker"]["replicas"] for o in there] == list(range(200))
    response = await ready.post("/convert", conversion_review(there, "nvidia.com/v1beta1"))
    assert response["convertedObjects"] == objects
    labels = {"resource_type": "DynamoGraphDeployment", "operation": "CONVERT"}
    assert ready.counted("requests_total", **labels, result="allowed") == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({**graph(), "spec": {"components": {"A": {}}}},
         "DynamoGraphDeployment team/chat can't be converted to nvidia.com/v1alpha1: "
         'spec.components: Input should be a valid list, found {"A": {}}'),
        ({**graph(), "kind": "DynamoModel"}, "no conversion of DynamoModel from nvidia.com/v1b"),
        ({**graph(), "metadata": None, "spec": 3}, "DynamoGraphDeployment /"),
        (3, "expected an object, found 3"),
    ],
)  # fmt: skip
async def test_an_object_that_fails_is_named(ready: Hook, wrong: Any, message: str) -> None:
    review = conversion_review([graph(), wrong], "nvidia.com/v1alpha1")
    response = await ready.post("/convert", review)
    assert response["result"]["status"] == "Failed"
    assert message in response["result"]["message"]
    assert response["convertedObjects"] == []


def conversion_review(objects: list[Any], version: str) -> Json:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "ConversionReview",
        "request": {"uid": "1", "desiredAPIVersion": version, "objects": objects},
    }


@pytest.mark.parametrize("path", ["/validate", "/convert"])
async def test_what_is_no_review_is_refused(ready: Hook, path: str) -> None:
    assert await ready.post(path, {"kind": "Pod"}) == 400
    assert await ready.post(path, []) == 400
