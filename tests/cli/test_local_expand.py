"""Environment and command lines, against Kubernetes' own examples."""

import base64
from collections.abc import Mapping
from typing import Any

import pytest
from dynamo_cli.local.expand import (
    Machine,
    Objects,
    PodFacts,
    Unresolved,
    environment,
    expand,
    quantity,
    resource_value,
    secret_data,
)
from hypothesis import given, settings
from hypothesis import strategies as st

POD = PodFacts(
    name="p-0", namespace="ns", uid="u-1", ip="127.77.0.9", labels={"a/b": "x"},
    annotations={"note": "y"}, service_account="sa",
)  # fmt: skip
MACHINE = Machine(cpus=4, memory=8 * 2**30)


def env(container: Mapping[str, Any], objects: Objects | None = None) -> dict[str, str]:
    return environment(container, POD, objects or Objects(), MACHINE)[0]


# The table of Kubernetes' own expansion tests (third_party/forked/golang/expansion), by behaviour.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(VAR_A)", "A"),
        ("___$(VAR_B)___", "___B___"),
        ("$(VAR_A)-$(VAR_B)", "A-B"),
        ("$(VAR_DNE)", "$(VAR_DNE)"),
        ("$$(VAR_A)", "$(VAR_A)"),
        ("$$$(VAR_A)", "$A"),
        ("$$$$(VAR_A)", "$$(VAR_A)"),
        ("foo$$$$$(VAR_A)bar", "foo$$Abar"),
        ("$(VAR_EMPTY)", ""),
        ("$", "$"),
        ("$$", "$"),
        ("a$", "a$"),
        ("$(", "$("),
        ("$(VAR_A", "$(VAR_A"),
        ("$VAR_A", "$VAR_A"),
        ("${VAR_A}", "${VAR_A}"),
        ("$()", "$()"),
        ("$(VAR_REF)", "$(VAR_A)"),
        ("\n$(VAR_A)", "\nA"),
        ("$?_boo", "$?_boo"),
    ],
)
def test_expansion(text: str, expected: str) -> None:
    variables = {"VAR_A": "A", "VAR_B": "B", "VAR_REF": "$(VAR_A)", "VAR_EMPTY": ""}
    assert expand(text, variables) == expected


@settings(deadline=None)
@given(st.text(alphabet="a$()V "))
def test_escaping_every_dollar_gives_the_text_back(text: str) -> None:
    assert expand(text.replace("$", "$$"), {"V": "value", "": "empty", "a": "b"}) == text


def test_a_value_sees_only_what_was_defined_before_it() -> None:
    # "Define Dependent Environment Variables" in Kubernetes' documentation.
    container = {
        "env": [
            {"name": "SERVICE_PORT", "value": "80"},
            {"name": "SERVICE_IP", "value": "172.17.0.1"},
            {"name": "UNCHANGED_REFERENCE", "value": "$(PROTOCOL)://$(SERVICE_IP):$(SERVICE_PORT)"},
            {"name": "PROTOCOL", "value": "https"},
            {"name": "SERVICE_ADDRESS", "value": "$(PROTOCOL)://$(SERVICE_IP):$(SERVICE_PORT)"},
            {"name": "ESCAPED_REFERENCE", "value": "$$(PROTOCOL)://$(SERVICE_IP):$(SERVICE_PORT)"},
        ]
    }
    variables = env(container)
    assert variables["UNCHANGED_REFERENCE"] == "$(PROTOCOL)://172.17.0.1:80"
    assert variables["SERVICE_ADDRESS"] == "https://172.17.0.1:80"
    assert variables["ESCAPED_REFERENCE"] == "$(PROTOCOL)://172.17.0.1:80"


def test_field_references() -> None:
    paths = {
        "NAME": "metadata.name", "NS": "metadata.namespace", "UID_": "metadata.uid",
        "IP": "status.podIP", "LABEL": "metadata.labels['a/b']",
        "NOTE": "metadata.annotations['note']", "NONE": "metadata.labels['none']",
        "SA": "spec.serviceAccountName",
    }  # fmt: skip
    container = {
        "env": [
            {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for name, path in paths.items()
        ]
    }
    assert env(container) == {
        "NAME": "p-0", "NS": "ns", "UID_": "u-1", "IP": "127.77.0.9", "LABEL": "x", "NOTE": "y",
        "NONE": "", "SA": "sa",
    }  # fmt: skip


def test_an_unknown_field_is_named() -> None:
    container = {"env": [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "spec.foo"}}}]}
    with pytest.raises(Unresolved, match=r"spec\.foo"):
        env(container)


def test_env_wins_over_env_from_and_may_refer_to_it() -> None:
    objects = Objects(config_maps={"c": {"A": "1", "B": "2", "bad=key": "3"}})
    container = {
        "envFrom": [
            {"configMapRef": {"name": "c"}},
            {"prefix": "P_", "configMapRef": {"name": "c"}},
        ],
        "env": [{"name": "A", "value": "$(B)!"}],
    }
    assert env(container, objects) == {"A": "2!", "B": "2", "P_A": "1", "P_B": "2"}


def test_config_map_keys() -> None:
    objects = Objects(config_maps={"c": {"k": "v"}})

    def refer(name: str, key: str, **more: object) -> dict[str, Any]:
        reference = {"name": name, "key": key, **more}
        return {"env": [{"name": "X", "valueFrom": {"configMapKeyRef": reference}}]}

    assert env(refer("c", "k"), objects) == {"X": "v"}
    assert env(refer("c", "none", optional=True), objects) == {}
    with pytest.raises(Unresolved, match="has no key 'none'"):
        env(refer("c", "none"), objects)
    with pytest.raises(Unresolved, match="ConfigMap 'd' is not in the file"):
        env(refer("d", "k"), objects)


def test_secrets_come_from_the_file_or_from_the_callers_environment() -> None:
    manifest = {
        "metadata": {"name": "s"},
        "data": {"KEY": base64.b64encode(b"stored").decode()},
        "stringData": {"OTHER": "plain"},
    }
    container = {"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "KEY"}}}]}
    stored = Objects(secrets={"s": secret_data(manifest)})
    assert env(container, stored) == {"X": "stored"}
    assert env(container, Objects(caller={"KEY": "mine"})) == {"X": "mine"}
    with pytest.raises(Unresolved, match=r"Secret 's' is not in the file; set KEY"):
        env(container)


def test_a_secret_of_env_from_that_is_missing_is_said_not_hidden() -> None:
    container = {"envFrom": [{"secretRef": {"name": "hf-token-secret"}}]}
    variables, notes = environment(container, POD, Objects(), MACHINE)
    assert variables == {}
    assert notes == ["Secret 'hf-token-secret' is not in the file: running without its variables"]
    container["envFrom"][0]["secretRef"]["optional"] = True  # type: ignore[assignment]
    assert environment(container, POD, Objects(), MACHINE)[1] == []


@pytest.mark.parametrize(
    ("resource", "divisor", "expected"),
    [
        ("limits.cpu", None, "1"),  # 250m, rounded up
        ("limits.cpu", "1m", "250"),
        ("limits.memory", None, str(64 * 2**20)),
        ("limits.memory", "1Mi", "64"),
        ("requests.memory", "1Mi", "32"),
        ("requests.cpu", "1m", "250"),  # no request: the limit
    ],
)
def test_resource_references(resource: str, divisor: str | None, expected: str) -> None:
    resources = {"limits": {"cpu": "250m", "memory": "64Mi"}, "requests": {"memory": "32Mi"}}
    reference = {"resource": resource} | ({"divisor": divisor} if divisor else {})
    assert resource_value(reference, resources, MACHINE) == expected


def test_without_a_limit_the_machine_is_the_limit() -> None:
    assert resource_value({"resource": "limits.cpu"}, {}, MACHINE) == "4"
    assert resource_value({"resource": "limits.memory", "divisor": "1Gi"}, {}, MACHINE) == "8"


def test_quantities() -> None:
    assert quantity("1e3") == 1000
    assert quantity("1.5Gi") == 1.5 * 2**30
    assert quantity(2) == 2
    with pytest.raises(Unresolved, match="is not a quantity"):
        quantity("2 GB")
