"""The command line of `dynamo frontend`: Dynamo's flags pass, mistakes are named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from dynamo_cli.frontend_command import unknown_arguments
from dynamo_cli.main import app
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """The command sets up logging for its process; the tests go on in theirs."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


KNOWN = ["--http-port", "--router-mode"]
FILE_WAITS = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
featureGates: [flowControl]
flowControl: {noEndpointRequestTTL: 30s, defaultRequestTTL: 10m}
"""


@pytest.mark.parametrize(
    ("arguments", "ignored"),
    [
        ([], []),
        (["--trust-remote-code"], ["--trust-remote-code"]),
        (
            ["--router-kv-events", "--kv-cache-block-size", "64", "--tool-call-parser=hermes"],
            ["--router-kv-events", "--kv-cache-block-size", "--tool-call-parser"],
        ),
    ],
)
def test_flags_of_dynamo_without_counterpart(arguments: list[str], ignored: list[str]) -> None:
    assert unknown_arguments(arguments, KNOWN) == (ignored, "")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--http-prot", "1"], "no such option: --http-prot; did you mean --http-port?"),
        (["--rooter-mode=kv"], "no such option: --rooter-mode; did you mean --router-mode?"),
        (["--xyzzy"], "no such option: --xyzzy"),
        (["kv"], "unexpected argument 'kv'"),
        (["--trust-remote-code", "yes", "kv"], "unexpected argument 'kv'"),
    ],
)
def test_anything_else_is_an_error(arguments: list[str], error: str) -> None:
    assert unknown_arguments(arguments, KNOWN)[1] == error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no endpoints"),
        (["--router-mode", "best"], "routing mode 'best' is unknown; use one of kv"),
        (["--router-temperature", "-1"], "temperature is -1.0; it must be a number ≥ 0"),
        (["--discovery-backend", "etcd"], "discovery backend 'etcd' is not available"),
        (["--log-level", "LOUD"], "log level 'LOUD' is unknown"),
        (["--http-port", "0"], "--http-port"),
        (["--htpp-port", "1"], "did you mean --http-port?"),
        (["--hold-seconds", "700"], "a request could wait 700 s"),
        (["--flow-control", "--queue-seconds", "0"], "a request could wait inf s"),
        (
            ["--config-text", FILE_WAITS],
            "a request could wait 630 s for its pick (flowControl.noEndpointRequestTTL 30 s and "
            "flowControl.defaultRequestTTL 600 s); the proxy gives up after 600 s",
        ),
        (["--tenant-limits", "missing.json"], "missing.json can't be read: No such file"),
    ],
)
def test_a_wrong_setting_is_one_clear_message(arguments: list[str], said: str) -> None:
    result = CliRunner(env={"DYN_ENDPOINTS_FILE": ""}).invoke(app, ["frontend", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    environment = {
        "DYN_ENDPOINTS_FILE": str(tmp_path / "missing" / "endpoints.json"),
        "DYN_ROUTER_MODE": "round-robin",
    }
    result = CliRunner(env=environment).invoke(app, ["frontend"])
    assert result.exit_code == 2
    assert f"{tmp_path}/missing is no folder" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "limits.json: Input data was truncated"),
        ('{"a": {"tokens_per_s": "x"}}', "limits.json: Expected `float`, got `str`"),
        (
            '{"a": {"tokens_per_s": -1}}',
            "limits.json: a: tokens_per_s is -1.0; it must be a number",
        ),
        ('{"a": {"tpm": 1}}', "limits.json: a has 'tpm'; a limit has requests_per_s, tokens_per_s"),
    ],
)
def test_a_wrong_file_of_limits_is_one_clear_message(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "limits.json"
    path.write_text(text)
    arguments = ["frontend", "--endpoints-file", str(tmp_path / "e.json"), "--tenant-limits"]
    result = CliRunner().invoke(app, [*arguments, str(path)])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
