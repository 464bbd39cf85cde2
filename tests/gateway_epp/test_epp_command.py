"""The command line of `dynamo epp`: that of the reference pickers, with mistakes named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from dynamo_cli import epp_command
from dynamo_cli.epp_command import duration, go_arguments, size
from dynamo_cli.main import app
from dynamo_epp.config import KvEvents
from dynamo_epp.gateway import GatewaySettings
from dynamo_epp.serving import PickerSettings, kv_events
from typer.testing import CliRunner

FLAGS, SWITCHES = ["--pool-name", "--secure-serving"], ["--secure-serving"]


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """The command sets up logging for its process; the tests go on in theirs."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a picker would have been started with."""
    from dynamo_epp import gateway, serving
    from dynamo_runtime import lifecycle

    seen: dict[str, Any] = {}

    def run_picker(settings: GatewaySettings, life: Any, make: Any) -> int:
        seen["settings"] = settings
        make(None)
        return 0

    def make_picker(settings: PickerSettings, *_: Any) -> None:
        seen["picker"] = settings

    def run(main: Any) -> int:
        with pytest.raises(StopIteration):
            main(None).send(None)
        return 0

    async def awaited(*arguments: Any) -> int:
        return run_picker(*arguments)

    monkeypatch.setattr(gateway, "run_picker", awaited)
    monkeypatch.setattr(serving, "ServingKvPicker", make_picker)
    monkeypatch.setattr(lifecycle, "run", run)
    return seen


def run(*arguments: str, **environment: str) -> Any:
    clean = {"KUBERNETES_SERVICE_HOST": "", "DYN_ENDPOINTS_FILE": "", "NAMESPACE": ""}
    clean |= {"POD_NAMESPACE": "", "DYN_PARENT_DGD_K8S_NAME": ""}
    return CliRunner(env=clean | environment).invoke(app, ["epp", *arguments])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["-pool-name", "x"], ["--pool-name", "x"]),
        (["--pool_name=x-y_z"], ["--pool-name=x-y_z"]),
        (["-secure-serving=false"], ["--no-secure-serving"]),
        (["--secure-serving=T"], ["--secure-serving"]),
        (["--secure-serving", "--unknown_flag=1"], ["--secure-serving", "--unknown_flag=1"]),
        (["x", "-"], ["x", "-"]),
    ],
)
def test_arguments_are_written_as_in_go(written: list[str], read: list[str]) -> None:
    assert go_arguments(written, FLAGS, SWITCHES) == read


def test_the_conformance_suites_arguments(started: dict[str, Any]) -> None:
    arguments = "--pool-name primary --pool-namespace app --zap-encoder json --grpc-port 9002"
    result = run(*arguments.split(), "--grpc-health-port", "9003", "--conformance-headers")
    assert result.exit_code == 0, result.output
    picker, settings = started["picker"], started["settings"]
    assert (picker.discovery_backend, picker.pool_name, picker.pool_namespace) == (
        "inference-pool",
        "primary",
        "app",
    )
    assert (settings.grpc_port, settings.health_port, settings.tls.enabled) == (9002, 9003, True)
    assert picker.any_path
    assert picker.relays


def test_where_engines_bring_their_events(started: dict[str, Any], tmp_path: Path) -> None:
    result = run("--pool-name", "p", "--kv-events-bind", "tcp://*:5557")
    assert result.exit_code == 0, result.output
    assert kv_events(started["picker"]) == KvEvents("tcp://*:5557", "kv@")
    file = tmp_path / "config.yaml"
    file.write_text(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n"
        "- type: precise-prefix-cache-scorer\n"
        "  parameters: {kvEventsConfig: {zmqEndpoint: 'tcp://*:5558', topicFilter: k}}\n"
    )
    assert run("--pool-name", "p", "--config-file", str(file)).exit_code == 0
    assert kv_events(started["picker"]) == KvEvents("tcp://*:5558", "k")
    both = ("--config-file", str(file), "--kv-events-bind", "tcp://*:5559")
    assert run("--pool-name", "p", *both).exit_code == 0
    assert kv_events(started["picker"]) == KvEvents("tcp://*:5559", "kv@")
    assert run("--pool-name", "p").exit_code == 0
    assert kv_events(started["picker"]) is None
    wrong = run("--pool-name", "p", "--kv-events-bind", "5557")
    assert wrong.exit_code == 2
    assert "write tcp://*:5557" in wrong.output


def test_a_deployment_of_the_reference_picker(started: dict[str, Any]) -> None:
    result = run(
        "-pool-name=p",
        "--ha-enable-leader-election",
        "--secure-serving=false",
        "--drain-timeout=1m30s",
        "--metrics-port=9091",
        "--metrics-endpoint-auth=false",
        "--tracing=false",
        "--refresh-metrics-interval",
        "50ms",
        "--v",
        "5",
        NAMESPACE="from-env",
    )
    assert result.exit_code == 0, result.output
    settings = started["settings"]
    assert (settings.drain_seconds, settings.status_port) == (90, 9091)
    assert not settings.tls.enabled
    assert started["picker"].pool_namespace == "from-env"


def test_without_any_pool(started: dict[str, Any]) -> None:
    result = run("--endpoint-selector", "app in (a,b),!c", "--endpoint-target-ports", "8000,8001")
    assert result.exit_code == 0, result.output
    picker = started["picker"]
    assert picker.discovery_backend == "pods"
    assert picker.endpoint_selector == "app in (a,b),!c"
    assert picker.endpoint_target_ports == (8000, 8001)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no endpoints: give --pool-name"),
        (["--pool-nam", "x"], "did you mean --pool-name?"),
        (["--pool-name", "x", "--endpoint-selector", "a=b"], "exclude each other"),
        (["--endpoint-selector", "a=b"], "need each other"),
        (["--endpoint-selector", "a=b", "--endpoint-target-ports", "http"], "no list of ports"),
        (["--endpoint-selector", "a=b", "--endpoint-target-ports", "0"], "ports are from 1"),
        (["--pool-name", "x", "--drain-timeout", "soon"], "'soon' is no duration; write 30s"),
        (["--pool-name", "x", "--tls-min-version", "1.2"], "write VersionTLS12"),
        (["--pool-name", "x", "--tls-cipher-suites", "TLS_RSA_X"], "TLS_RSA_X is none that"),
        (["--pool-name", "x", "--metrics-cert-dir", "/c"], "--metrics-cert-dir can't be had"),
        (["--pool-name", "x", "--router-mode", "best"], "routing mode 'best' is unknown"),
        (["--pool-name", "x", "--grpc-max-recv-msg-size", "big"], "'big' is no size"),
    ],
)
def test_mistakes_are_named(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_durations_and_sizes_as_go_writes_them() -> None:
    assert [duration(text) for text in ("30s", "1m30s", "50ms", "1.5h", "7")] == [
        30,
        90,
        0.05,
        5400,
        7,
    ]
    assert [size(text) for text in ("10MiB", "25MB", "1024", "1Gi", "2k")] == [
        10 << 20,
        25_000_000,
        1024,
        1 << 30,
        2000,
    ]
    for text in ("1x", "nan", "inf", "-5"):
        with pytest.raises(typer.BadParameter):
            duration(text)


def test_each_flag_has_one_meaning() -> None:
    known = set(epp_command.WITHOUT_COUNTERPART)
    assert known.isdisjoint(epp_command.REFUSED)
    assert all(name.startswith("--") for name in known | set(epp_command.REFUSED))


@pytest.mark.parametrize(
    ("arguments", "environment", "followed"),
    [
        (["--pool-name", "p", "--pool-group", "g"], {}, "p"),
        (["--graph", "a"], {"DYN_RULES_POOL": "a-pool"}, "a-pool"),
        (["--graph", "a"], {}, ""),
        (["--endpoint-selector", "a=b", "--endpoint-target-ports", "80"], {}, ""),
    ],
)
def test_whose_objectives_and_rewrites_hold(
    started: dict[str, Any],
    arguments: list[str],
    environment: dict[str, str],
    followed: str,
) -> None:
    result = run(*arguments, **environment)
    assert result.exit_code == 0, result.output
    assert started["picker"].ruled_pool == followed
    assert ("InferenceModelRewrites are not followed" in result.output) == (not followed)


def test_a_file_of_endpoints(started: dict[str, Any], tmp_path: Path) -> None:
    result = run("--endpoints-file", str(tmp_path / "endpoints.json"))
    assert result.exit_code == 0, result.output
    assert started["picker"].discovery_backend == "file"


def test_suites_are_named_as_openssl_does() -> None:
    names = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, TLS_AES_128_GCM_SHA256,"
    names += "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305"
    assert epp_command.cipher_suites(names) == (
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
    )
