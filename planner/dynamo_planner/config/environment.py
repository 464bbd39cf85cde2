"""Keys that Dynamo also takes from the environment; what the configuration says wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

_PREFIX = "metric_pulling_prometheus_"
_TEXTS = {
    "PROMETHEUS_ENDPOINT": f"{_PREFIX}endpoint",
    "PROMETHEUS_TOKEN": f"{_PREFIX}token",
    "PROMETHEUS_TOKEN_FILE": f"{_PREFIX}token_file",
    "PROMETHEUS_CA_BUNDLE": f"{_PREFIX}ca_bundle",
}
VERIFY, PARAMETERS = "PROMETHEUS_SSL_VERIFY", "PROMETHEUS_EXTRA_QUERY_PARAMS"
TIMEOUT = "DYN_PLANNER_PROMETHEUS_REQUEST_TIMEOUT_SECONDS"


def from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """Key -> value of those variables that are set. Raises ValueError with the variable's name."""
    found: dict[str, Any] = {key: env[name] for name, key in _TEXTS.items() if env.get(name)}
    if text := env.get(VERIFY):
        found[f"{_PREFIX}ssl_verify"] = text.lower() in ("1", "true", "yes")
    if text := env.get(PARAMETERS):
        try:
            found[f"{_PREFIX}extra_query_params"] = dict(parse_qsl(text, strict_parsing=True))
        except ValueError as error:
            raise ValueError(f"{PARAMETERS} is {text!r}; write tenant=a&team=b") from error
    if text := env.get(TIMEOUT):
        try:
            found[f"{_PREFIX}request_timeout_seconds"] = float(text)
        except ValueError as error:
            raise ValueError(f"{TIMEOUT} is {text!r}; write seconds, such as 10") from error
    return found
