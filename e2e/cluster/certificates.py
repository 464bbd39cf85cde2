"""The cluster's certificates and kubeconfigs, made anew for each run.

Two authorities, as the API server wants them: one for everybody, one by which extension API servers
know the aggregator.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from e2e.cluster.settings import NODE, Network

DAYS = 365
SERVER_NAMES = (
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    "127.0.0.1",
)
CLIENTS = {
    "admin": ("admin", "system:masters"),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
}
"""File name -> (user, group) of each client of the API server."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def write(self, folder: Path, name: str) -> None:
        """`NAME.crt` and `NAME.key` (readable by the owner only)."""
        (folder / f"{name}.crt").write_bytes(
            self.certificate.public_bytes(serialization.Encoding.PEM)
        )
        write_key(folder / f"{name}.key", self.key)


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """The key as PEM, readable by the owner only."""
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,  # what the API server reads
            serialization.NoEncryption(),
        )
    )


def issue(
    name: str, group: str = "", names: Sequence[str] = (), authority: Pair | None = None
) -> Pair:
    """A certificate for both uses, signed by `authority`; without one, an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if group:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
    subject = x509.Name(attributes)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if authority:
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    if names:
        entries = [_general_name(entry) for entry in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(entries), critical=False)
    signer = authority.key if authority else key
    return Pair(key, builder.sign(signer, hashes.SHA256()))


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def make(folder: Path, network: Network) -> None:
    """All keys and certificates of a cluster, into a new folder."""
    folder.mkdir(mode=0o700)
    authority = issue("dynamo-e2e")
    authority.write(folder, "ca")
    front_proxy = issue("dynamo-e2e-front-proxy")
    front_proxy.write(folder, "front-proxy-ca")
    issue("front-proxy-client", authority=front_proxy).write(folder, "front-proxy-client")
    names = (*SERVER_NAMES, network.node_ip, network.service_ip)
    issue("kube-apiserver", names=names, authority=authority).write(folder, "apiserver")
    server = issue(f"system:node:{NODE}", "system:nodes", [network.node_ip, NODE], authority)
    server.write(folder, "kubelet-server")
    for file, (user, group) in CLIENTS.items():
        issue(user, group, authority=authority).write(folder, file)
    tokens = ec.generate_private_key(ec.SECP256R1())
    write_key(folder / "service-accounts.key", tokens)


def write_kubeconfig(path: Path, pki: Path, client: str, server: str) -> None:
    """A kubeconfig with everything in it, for the client of that file name."""

    def data(name: str) -> str:
        return base64.b64encode((pki / name).read_bytes()).decode()

    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "e2e",
        "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": client}}],
        "clusters": [
            {
                "name": "e2e",
                "cluster": {"server": server, "certificate-authority-data": data("ca.crt")},
            }
        ],
        "users": [
            {
                "name": client,
                "user": {
                    "client-certificate-data": data(f"{client}.crt"),
                    "client-key-data": data(f"{client}.key"),
                },
            }
        ],
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
