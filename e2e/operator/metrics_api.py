"""An API server of metrics, as an adapter of Prometheus is one: `external.metrics.k8s.io`.

It knows one metric, whose value the test sets. It runs on this machine; a Service without selector
leads the cluster's API server to it.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from e2e.operator.space import Json, Space

GROUP = "external.metrics.k8s.io"
VERSION = "v1beta1"
SERVICE = "external-metrics"


class MetricsApi:
    """Serves the metric `name` in every namespace, with the number `value`."""

    def __init__(self, space: Space, name: str) -> None:
        self.value = 0
        self._space, self._name = space, name
        self._address = space.cluster.host_ip
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer = api._answer(self.path.partition("?")[0])
                body = json.dumps(answer).encode()
                self.send_response(200 if "code" not in answer else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing: what matters shows in the test."""

        self._server = ThreadingHTTPServer((self._address, 0), Handler)
        self._server.daemon_threads = True
        self._server.socket = _tls(self._address).wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        """Returns when the cluster's API server passes requests on."""
        self._thread.start()
        self._space.apply(*self._manifests())

        def available() -> bool:
            listed = self._space.cluster.kubectl("get", "--raw", f"/apis/{GROUP}/{VERSION}")
            return self._name in listed.stdout

        self._space.until(available, f"{GROUP} served", 60.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        # Left behind, it would make every look at all of the API fail.
        self._space.cluster.kubectl("delete", "apiservice", f"{VERSION}.{GROUP}")
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10.0)

    def _answer(self, path: str) -> Json:
        parts = path.strip("/").split("/")
        if parts == ["apis", GROUP, VERSION]:
            resource = {
                "name": self._name,
                "kind": "ExternalMetricValueList",
                "namespaced": True,
                "verbs": ["get"],
            }
            return {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": f"{GROUP}/{VERSION}",
                "resources": [resource],
            }
        if parts[:4] == ["apis", GROUP, VERSION, "namespaces"] and parts[5:] == [self._name]:
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            value = {
                "metricName": self._name,
                "metricLabels": {},
                "timestamp": now,
                "value": str(self.value),
            }
            return {
                "kind": "ExternalMetricValueList",
                "apiVersion": f"{GROUP}/{VERSION}",
                "metadata": {},
                "items": [value],
            }
        return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404}

    def _manifests(self) -> list[Json]:
        port = self._server.server_address[1]
        return [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": SERVICE},
                "spec": {"ports": [{"name": "https", "port": 443, "targetPort": port}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": SERVICE,
                    "labels": {"kubernetes.io/service-name": SERVICE},
                },
                "addressType": "IPv4",
                "endpoints": [{"addresses": [self._address], "conditions": {"ready": True}}],
                "ports": [{"name": "https", "port": port}],
            },
            {
                "apiVersion": "apiregistration.k8s.io/v1",
                "kind": "APIService",
                "metadata": {"name": f"{VERSION}.{GROUP}"},
                "spec": {
                    "group": GROUP,
                    "version": VERSION,
                    "groupPriorityMinimum": 100,
                    "versionPriority": 100,
                    "insecureSkipTLSVerify": True,
                    "service": {"name": SERVICE, "namespace": self._space.name, "port": 443},
                },
            },
        ]


def _tls(address: str) -> ssl.SSLContext:
    """With a certificate that nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVICE)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False
        )
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tls.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context.load_cert_chain(file)
    return context
