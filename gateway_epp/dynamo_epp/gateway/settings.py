"""What can be set on a picker behind a Gateway; names and defaults of the reference pickers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Tls:
    """How the picker's port is secured; a Gateway connects with TLS unless it is told otherwise."""

    enabled: bool = True
    cert_path: Path | None = None
    """Folder with ``tls.crt`` and ``tls.key``; without one, a self-signed pair in memory."""
    reload: bool = False
    """Use certificates that replace those in the folder, from the next connection on."""
    only_1_3: bool = False
    """TLS 1.2 is not spoken. Nothing older ever is."""
    ciphers: tuple[str, ...] = ()
    """The suites of TLS 1.2 that are spoken, as OpenSSL names them; empty: OpenSSL's own choice."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """All times are seconds, all sizes bytes."""

    host: str = "0.0.0.0"
    """Bind address of every port."""
    grpc_port: int = 9002
    """ext_proc (and health)."""
    health_port: int = 9003
    """gRPC health in plain text, for probes; 0: only on ``grpc_port``."""
    status_port: int = 9090
    """Status server: metrics, readiness with its reason, `/debug`."""
    tls: Tls = field(default_factory=Tls)
    body_limit: int = 32 * 1024 * 1024
    """A larger request body is answered with 413."""
    drain_seconds: float = 30.0
    """On SIGTERM running requests get this long to end…"""
    drain_accept_seconds: float = 5.0
    """…and new ones are taken for this part of it, until the Gateway knows of the end."""
    decision_header: bool = False
    """Put how the pick was made on responses. For trusted clients: it tells what is cached."""
    conformance_headers: bool = False
    """Obey the headers of the extension's conformance suite. For tests: clients can choose an
    endpoint with them."""
