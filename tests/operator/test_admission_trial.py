"""The API server's words about rendered objects, told as the author's own fields."""

from __future__ import annotations

from typing import Any

import pytest
from dynamo_crds.v1beta1 import DynamoGraphDeployment
from dynamo_operator.admission.trial import Trial, circumstance, refused, tokens, trials
from dynamo_operator.admission.wording import Wording
from dynamo_operator.render import Platform, render_with_notes

Json = dict[str, Any]
V1BETA1 = Wording("nvidia.com/v1beta1")
V1ALPHA1 = Wording("nvidia.com/v1alpha1")

GRAPH = DynamoGraphDeployment.model_validate(
    {
        "metadata": {"name": "chat", "namespace": "team"},
        "spec": {
            "env": [{"name": "SHARED", "value": "1"}],
            "components": [
                {"name": "Frontend", "type": "frontend"},
                {
                    "name": "Worker",
                    "type": "worker",
                    "podTemplate": {
                        "metadata": {"labels": {"team": "x"}},
                        "spec": {
                            "containers": [
                                {"name": "logger", "image": "logger"},
                                {
                                    "name": "main",
                                    "image": "engine",
                                    "env": [{"name": "MINE", "value": "2"}],
                                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                                },
                            ],
                        },
                    },
                },
            ],
        },
    }
)


@pytest.fixture
def worker() -> Trial:
    rendered = render_with_notes(GRAPH, Platform(image_tag="test"))
    (found,) = [
        trial for trial in trials(GRAPH, rendered, None) if trial.label == "Deployment chat-worker"
    ]
    return found


def index(items: list[Json], **wanted: Any) -> int:
    (found,) = [i for i, item in enumerate(items) if item.items() >= wanted.items()]
    return found


def said(trial: Trial, field: str, wording: Wording = V1BETA1) -> str:
    """The field that a cause at `field` is told as."""
    body = {"details": {"causes": [{"field": field, "message": "Invalid value: 1: no"}]}}
    (denial,) = refused(trial, 422, "all of it", body, wording)
    assert "Invalid value: 1: no" in denial.message
    return denial.field


def pod(trial: Trial) -> Json:
    spec: Json = trial.manifest["spec"]["template"]["spec"]
    return spec


def test_containers_are_found_by_name(worker: Trial) -> None:
    main = index(pod(worker)["containers"], name="main")
    field = f"spec.template.spec.containers[{main}].resources.limits[nvidia.com/gpu]"
    limit = 'resources.limits["nvidia.com/gpu"]'
    assert said(worker, field) == f"spec.components[1].podTemplate.spec.containers[1].{limit}"
    assert said(worker, field, V1ALPHA1) == (
        f"spec.services.Worker.extraPodSpec.mainContainer.{limit}"
    )


def test_variables_lead_to_the_component_or_to_the_graph(worker: Trial) -> None:
    main = index(pod(worker)["containers"], name="main")
    env = pod(worker)["containers"][main]["env"]
    at = f"spec.template.spec.containers[{main}].env"
    assert said(worker, f"{at}[{index(env, name='MINE')}].value") == (
        "spec.components[1].podTemplate.spec.containers[1].env[0].value"
    )
    shared = f"{at}[{index(env, name='SHARED')}].name"
    assert said(worker, shared) == "spec.env[0].name"
    assert said(worker, shared, V1ALPHA1) == "spec.envs[0].name"


def test_what_the_platform_added_is_told_as_rendered(worker: Trial) -> None:
    main = index(pod(worker)["containers"], name="main")
    env = pod(worker)["containers"][main]["env"]
    field = f"spec.template.spec.containers[{main}].env[{index(env, name='POD_NAME')}].value"
    body = {"details": {"causes": [{"field": field, "message": "no"}]}}
    (denial,) = refused(worker, 422, "all of it", body, V1BETA1)
    assert str(denial) == f"spec.components[1]: rendered Deployment chat-worker: {field}: no"


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ("spec.template.labels", "spec.components[1].podTemplate.metadata.labels"),
        ("spec.template.spec.nodeSelector", "spec.components[1].podTemplate.spec.nodeSelector"),
        ("metadata.labels", "spec.labels"),
        ("metadata.annotations", "spec.annotations"),
        ("spec.progressDeadlineSeconds", "spec.components[1]"),
    ],
)
def test_other_fields(worker: Trial, field: str, place: str) -> None:
    assert said(worker, field) == place


PREFIX = 'Deployment in version "v1" cannot be handled as a Deployment: '


def test_fields_that_do_not_exist_are_named(worker: Trial) -> None:
    main = index(pod(worker)["containers"], name="main")
    message = (
        f"{PREFIX}strict decoding error: "
        f'unknown field "spec.template.spec.containers[{main}].imge", '
        'unknown field "spec.template.spec.tolerance"'
    )
    assert [str(d) for d in refused(worker, 400, message, {}, V1BETA1)] == [
        "spec.components[1].podTemplate.spec.containers[1].imge: no such field (component Worker)",
        "spec.components[1].podTemplate.spec.tolerance: no such field (component Worker)",
    ]


@pytest.mark.parametrize(
    ("found", "field", "wanted", "said"),
    [
        ("string", "spec.template.spec.containers.ports", "[]v1.ContainerPort",
         "podTemplate.spec.containers.ports: found a string, expected a list"),
        ("number", "spec.template.spec.containers.env.value", "string",
         "podTemplate.spec.containers.env.value: found a number, expected a text"),
        ("string", "spec.template.spec.priority", "int32",
         "podTemplate.spec.priority: found a string, expected an integer"),
        ("number", "spec.template.spec.securityContext", "v1.PodSecurityContext",
         "podTemplate.spec.securityContext: found a number, expected a mapping"),
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_are_named(
    worker: Trial, found: str, field: str, wanted: str, said: str
) -> None:
    message = (
        f"{PREFIX}json: cannot unmarshal {found} into Go struct field X.{field} of type {wanted}"
    )
    (denial,) = refused(worker, 400, message, {}, V1BETA1)
    assert str(denial) == f"spec.components[1].{said} (component Worker)"


def test_words_without_a_field_stay_with_the_component(worker: Trial) -> None:
    message = f"{PREFIX}quantities must match the regular expression 'x'"
    (denial,) = refused(worker, 400, message, {}, V1BETA1)
    assert str(denial) == (
        "spec.components[1].podTemplate: quantities must match the regular expression 'x' "
        "(component Worker)"
    )
    (denial,) = refused(worker, 422, "Deployment is invalid", {}, V1ALPHA1)
    assert str(denial) == (
        "spec.services.Worker.extraPodSpec: Deployment is invalid (service Worker)"
    )


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, 'admission webhook "x" does not support dry run'),
        (400, 'admission webhook "policy" denied the request: no'),
        (403, "exceeded quota: gpus"),
        (404, "the server could not find the requested resource"),
        (409, "already exists"),
        (429, "too many requests"),
        (500, "etcdserver: timeout"),
        (0, "no answer"),
    ],
)
def test_circumstances_deny_nothing(worker: Trial, status: int, message: str) -> None:
    assert refused(worker, status, message, {}, V1BETA1) == []
    warning = circumstance(worker, status, message)
    assert (warning is None) == (status == 409)
    if warning is not None and status != 404:
        assert warning == f"Deployment chat-worker could not be tried: {message}"


def test_tokens() -> None:
    assert tokens("spec.containers[0].limits[nvidia.com/gpu].x") == (
        "spec", "containers", 0, "limits", "nvidia.com/gpu", "x",
    )  # fmt: skip
    assert tokens("") == ()
