"""Certificates of the picker's port.

Gateways don't verify a picker's certificate as a rule, so the default is a self-signed one that
lives as long as the process. Certificates of one's own are read from a folder, as a mounted Secret
of type ``kubernetes.io/tls`` has it; a replaced pair is used for the next connection, checked
before: a pair that does not fit together changes nothing.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dynamo_epp.gateway.settings import Tls

log = logging.getLogger(__name__)

CERTIFICATE, KEY = "tls.crt", "tls.key"
SELF_SIGNED_LIFE = timedelta(days=3650)  # the process ends sooner
BACKDATED = timedelta(minutes=5)
"""Clocks of a cluster's machines differ a little."""


class InvalidCertificate(Exception):
    """A certificate or key that can't be used; the message names the file."""


def server_context(tls: Tls, now: datetime) -> ssl.SSLContext | None:
    """What the port is secured with; None: nothing. Raises ``InvalidCertificate``."""
    if not tls.enabled:
        return None
    if tls.cert_path is None:
        context = _context(tls)
        _load(context, *self_signed(now))
        return context
    source = CertificateFolder(tls.cert_path, lambda: _context(tls))
    if tls.reload:
        source.context.sni_callback = source.refresh
    return source.context


def _context(tls: Tls) -> ssl.SSLContext:
    """Raises ``ValueError`` for suites that OpenSSL does not know."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    oldest = ssl.TLSVersion.TLSv1_3 if tls.only_1_3 else ssl.TLSVersion.TLSv1_2
    context.minimum_version = oldest  # RFC 9113 section 9.2: nothing before 1.2
    if tls.ciphers:
        context.set_ciphers(":".join(tls.ciphers))
    context.set_alpn_protocols(["h2"])
    return context


def _load(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Take a pair in PEM. Python's ssl reads files only; this one is in memory, so that a key is
    never on a disk, and none need be writable."""
    file = os.memfd_create("tls")
    try:
        os.write(file, certificate + key)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def self_signed(now: datetime) -> tuple[bytes, bytes]:
    """A certificate for nobody in particular and its key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dynamo-epp")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + SELF_SIGNED_LIFE)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("dynamo-epp"), x509.DNSName("localhost")]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


class CertificateFolder:
    """A certificate and its key in a folder, which somebody may replace."""

    def __init__(self, folder: Path, make: Callable[[], ssl.SSLContext]) -> None:
        """``make`` makes the contexts that the pair goes into. Raises ``InvalidCertificate``."""
        self._make = make
        self._files = (folder / CERTIFICATE, folder / KEY)
        self._problem = ""
        self._version = self._stamp()
        self.context = self._read()

    def refresh(
        self, connection: ssl.SSLObject | ssl.SSLSocket, _: str | None, __: ssl.SSLContext
    ) -> None:
        """Show the pair that is there now; called at each handshake, whatever name it asks for."""
        try:
            version = self._stamp()
            if version != self._version:
                self.context = self._read()
                self._version, self._problem = version, ""
                log.info("certificate of %s taken into use", self._files[0])
        except InvalidCertificate as error:
            if str(error) != self._problem:
                log.error("%s; the certificate before it stays in use", error)
            self._problem = str(error)
        connection.context = self.context

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        try:
            stats = [file.stat() for file in self._files]
        except OSError as error:
            raise InvalidCertificate(f"{error.filename}: {error.strerror}") from error
        return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)

    def _read(self) -> ssl.SSLContext:
        certificate, key = self._files
        context = self._make()
        try:
            # With a password, as OpenSSL would ask the terminal for that of an encrypted key.
            context.load_cert_chain(certificate, key, password="")
            return context
        except ssl.SSLError as error:
            raise InvalidCertificate(
                f"{certificate} and {key.name} are no certificate and its key, both PEM: {error}"
            ) from error
        except OSError as error:
            raise InvalidCertificate(f"{error.filename or key}: {error.strerror}") from error


def now() -> datetime:
    return datetime.now(UTC)
