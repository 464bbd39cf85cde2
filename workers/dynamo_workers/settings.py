"""What the launcher is told by its pod: addresses, names and time limits, all by environment."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from dynamo_workers.engines.arguments import BadArguments


@dataclass(frozen=True, slots=True)
class Settings:
    """One worker pod. Times are seconds."""

    name: str = "worker"
    """POD_NAME: how pickers know this worker; the host name if unset."""
    http_host: str = "0.0.0.0"
    """DYN_HTTP_HOST: where the engine listens for requests."""
    http_port: int = 8000
    """DYN_HTTP_PORT"""
    system_host: str = "0.0.0.0"
    """DYN_SYSTEM_HOST: where the status server and the worker stream listen."""
    system_port: int = 9090
    """DYN_SYSTEM_PORT: status server."""
    stream_port: int = 5557
    """DYN_STREAM_PORT: worker stream."""
    ready_without_picker_s: float = 60.0
    """DYN_READY_WITHOUT_PICKER_SECONDS: how long a healthy engine waits for its first picker
    before it turns ready without one; 0 waits not at all."""
    drain_s: float = 300.0
    """DYN_DRAIN_SECONDS: how long running requests may take to finish once a stop is requested.
    The pod's terminationGracePeriodSeconds must be longer by ``stop_grace_s``."""
    drain_quiet_s: float = 1.0
    """DYN_DRAIN_QUIET_SECONDS: how long no request may be running before the engine is stopped.
    Covers those already on their way when the pickers learn of the drain."""
    stop_grace_s: float = 15.0
    """DYN_STOP_SECONDS: from SIGTERM to SIGKILL for an idle engine."""
    health_timeout_s: float = 5.0
    """DYN_HEALTH_TIMEOUT_SECONDS: how long an answer of the engine to a check may take. Three in
    a row without one make the worker unready."""
    hung_s: float = 60.0
    """DYN_HUNG_SECONDS: an engine that answers no check for so long is killed, and the worker ends.
    Requests that wait in it would wait for ever; then those of which no byte was answered are
    answered elsewhere. 0: it is left as it is."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Raises ``BadArguments`` naming the variable."""
        default = cls()
        return cls(
            name=env.get("POD_NAME") or socket.gethostname(),
            http_host=env.get("DYN_HTTP_HOST") or default.http_host,
            http_port=_port(env, "DYN_HTTP_PORT", default.http_port),
            system_host=env.get("DYN_SYSTEM_HOST") or default.system_host,
            system_port=_port(env, "DYN_SYSTEM_PORT", default.system_port),
            stream_port=_port(env, "DYN_STREAM_PORT", default.stream_port),
            ready_without_picker_s=_seconds(
                env, "DYN_READY_WITHOUT_PICKER_SECONDS", default.ready_without_picker_s
            ),
            drain_s=_seconds(env, "DYN_DRAIN_SECONDS", default.drain_s),
            drain_quiet_s=_seconds(env, "DYN_DRAIN_QUIET_SECONDS", default.drain_quiet_s),
            stop_grace_s=_seconds(env, "DYN_STOP_SECONDS", default.stop_grace_s),
            health_timeout_s=_seconds(env, "DYN_HEALTH_TIMEOUT_SECONDS", default.health_timeout_s),
            hung_s=_seconds(env, "DYN_HUNG_SECONDS", default.hung_s),
        )

    @property
    def stream_address(self) -> str:
        host = f"[{self.system_host}]" if ":" in self.system_host else self.system_host
        return f"tcp://{host}:{self.stream_port}"


def _port(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) > 65535:
        raise BadArguments(f"{name}={text!r}: a port is a number from 0 to 65535")
    return int(text)


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise BadArguments(f"{name}={text!r}: give seconds, 0 or more")
    return value
