"""Whose CRDs are in the cluster, and what becomes of them."""

from __future__ import annotations

import copy
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dynamo_cli.main import app
from dynamo_crds.generate import KINDS, WebhookService, definition
from dynamo_operator.install.crds import (
    RELEASE_LABEL,
    ForeignCrds,
    Owner,
    apply_crds,
    crd_owner,
    newer_release,
    released,
)
from dynamo_operator.install.settings import CRD_NAMES
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from typer.testing import CliRunner

from tests.runtime.kube_api import KubeApi, failure, serving

Json = dict[str, Any]
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
SERVICE = WebhookService()


@pytest.fixture
async def api() -> AsyncIterator[KubeApi]:
    async with serving() as api:
        yield api


@pytest.fixture
async def client(api: KubeApi) -> AsyncIterator[KubernetesClient]:
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        yield client


def stored(api: KubeApi, name: str) -> Json:
    return api.objects[CRDS, "", name]


def ours(index: int = 0) -> Json:
    return copy.deepcopy(definition(KINDS[index], SERVICE))


def marked(**metadata: Any) -> Json:
    """One of ours over which another installer went, leaving a mark."""
    crd = ours()
    for part, values in metadata.items():
        crd["metadata"][part] = {**crd["metadata"].get(part, {}), **values}
    return crd


def test_ours_is_ours() -> None:
    assert crd_owner(None) is None
    assert crd_owner(ours()) is Owner.OURS
    unlabelled = ours()
    del unlabelled["metadata"]["labels"]
    assert crd_owner(unlabelled) is Owner.UNKNOWN
    assert crd_owner({}) is Owner.UNKNOWN


@pytest.mark.parametrize(
    "metadata",
    [
        {"annotations": {"controller-gen.kubebuilder.io/version": "v0.17.3"}},
        {"annotations": {"meta.helm.sh/release-name": "dynamo"}},
        {"labels": {"app.kubernetes.io/part-of": "dynamo-platform"}},
        {"labels": {"helm.sh/chart": "dynamo-operator-1.6.0"}},
        {"labels": {"app.kubernetes.io/name": "dynamo-operator"}},
    ],
)
def test_what_dynamos_installer_leaves_tells_them(metadata: Json) -> None:
    assert crd_owner(marked(**metadata)) is Owner.DYNAMO


def test_dynamos_own_are_told_by_more_than_one_mark() -> None:
    folder = os.environ.get("CORPORA")
    if not folder:
        pytest.skip("CORPORA is not set: it names the folder with Dynamo's CRDs")
    for kind in KINDS:
        path = Path(folder) / "crds" / kind.file
        crd = yaml.load(path.read_text(), yaml.CSafeLoader)
        assert crd_owner(crd) is Owner.DYNAMO
        crd["metadata"] = {"name": kind.crd, "labels": ours()["metadata"]["labels"]}
        assert crd_owner(crd) is Owner.DYNAMO
    # Without annotations and service, the schema of the graph still tells.
    graph = yaml.load((Path(folder) / "crds" / KINDS[0].file).read_text(), yaml.CSafeLoader)
    graph["metadata"], graph["spec"]["conversion"] = ours()["metadata"], {"strategy": "None"}
    assert crd_owner(graph) is Owner.DYNAMO


async def test_they_are_installed_and_updated(api: KubeApi, client: KubernetesClient) -> None:
    assert [a.result for a in await apply_crds(client, SERVICE)] == ["created", "created"]
    for kind in KINDS:
        assert crd_owner(stored(api, kind.crd)) is Owner.OURS
    assert [m for m, _ in api.requests if m not in ("GET", "PATCH")] == []
    old = stored(api, CRD_NAMES[0])
    old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["old"] = {}
    old["spec"]["conversion"]["webhook"]["clientConfig"]["caBundle"] = "AAAA"
    old["metadata"]["labels"]["argocd.example/instance"] = "x"
    assert (await apply_crds(client, SERVICE))[0].result == "updated"
    new = stored(api, CRD_NAMES[0])
    schema = new["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert "old" not in schema["properties"]
    assert new["spec"]["conversion"]["webhook"]["clientConfig"]["caBundle"] == "AAAA"
    assert new["metadata"]["labels"]["argocd.example/instance"] == "x"


async def test_all_or_none(api: KubeApi, client: KubernetesClient) -> None:
    foreign = ours(1)
    foreign["metadata"]["annotations"]["controller-gen.kubebuilder.io/version"] = "v0.17.3"
    before = api.put(CRDS, foreign)
    with pytest.raises(ForeignCrds) as caught:
        await apply_crds(client, SERVICE)
    assert caught.value.found[0][:2] == (CRD_NAMES[1], Owner.DYNAMO)
    text = str(caught.value)
    assert f"- {CRD_NAMES[1]}: an installed Dynamo (annotation controller-gen" in text
    assert "--take-over" in text
    assert [key[2] for key in api.objects] == [CRD_NAMES[1]]
    assert stored(api, CRD_NAMES[1]) == before


async def test_taken_over_they_bear_no_mark_of_others(
    api: KubeApi, client: KubernetesClient
) -> None:
    foreign = ours(0)
    foreign["metadata"]["labels"] = {"helm.sh/chart": "dynamo-operator-1.6.0"}
    foreign["metadata"]["annotations"] = {"controller-gen.kubebuilder.io/version": "v0.17.3"}
    foreign["spec"]["conversion"]["webhook"]["clientConfig"]["caBundle"] = "AAAA"
    api.put(CRDS, foreign)
    await apply_crds(client, SERVICE, take_over=True)
    assert crd_owner(stored(api, CRD_NAMES[0])) is Owner.OURS
    assert (
        "caBundle" not in stored(api, CRD_NAMES[0])["spec"]["conversion"]["webhook"]["clientConfig"]
    )


async def test_those_of_a_newer_release_are_left_alone(
    api: KubeApi, client: KubernetesClient
) -> None:
    await apply_crds(client, SERVICE)
    newer = api.put(CRDS, marked(labels={RELEASE_LABEL: "99.0.0"}))
    older = ours(1)
    older["metadata"]["labels"][RELEASE_LABEL] = "0.0.1"
    api.put(CRDS, older)
    results = [applied.result for applied in await apply_crds(client, SERVICE)]
    assert results == ["left to release 99.0.0", "updated"]
    assert stored(api, CRD_NAMES[0]) == newer
    await apply_crds(client, SERVICE, take_over=True)
    assert newer_release(stored(api, CRD_NAMES[0])) == ""


@pytest.mark.parametrize(
    ("wrote", "ours", "is_newer"),
    [
        ("1.10.0", "1.9.0", True),
        ("1.9.0", "1.10.0", False),
        ("1.9.0", "1.9.0", False),
        ("1.9.0rc1", "1.9.0", False),
        ("2", "1.9.0", True),
        ("latest", "1.9.0", False),
        (None, "1.9.0", False),
    ],
)
def test_releases_are_compared_by_number(wrote: str | None, ours: str, is_newer: bool) -> None:
    crd = {"metadata": {"labels": {RELEASE_LABEL: wrote} if wrote else {}}}
    assert newer_release(crd, ours) == (wrote if is_newer else "")


async def test_a_race_is_run_again(api: KubeApi, client: KubernetesClient) -> None:
    await apply_crds(client, SERVICE)
    api.failures += [
        lambda _: None,
        lambda _: None,
        lambda _: failure(409, "Conflict", "the object has been modified"),
    ]
    assert len(await apply_crds(client, SERVICE)) == 2


def test_the_command_prints_them() -> None:
    printed = list(yaml.safe_load_all(CliRunner().invoke(app, ["operator", "crds"]).output))
    assert printed == [released(kind, SERVICE) for kind in KINDS]
    arguments = ["operator", "crds", "--no-webhook"]
    printed = list(yaml.safe_load_all(CliRunner().invoke(app, arguments).output))
    assert printed == [released(kind, None) for kind in KINDS]


def test_the_command_says_where_it_fails(tmp_path: Path) -> None:
    missing = tmp_path / "kubeconfig"
    arguments = ["operator", "crds", "--apply", "--kubeconfig", str(missing)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert f"dynamo operator crds: {missing}: no such kubeconfig file" in result.output
