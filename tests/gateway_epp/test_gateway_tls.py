"""Certificates of the picker's port: self-signed, one's own, replaced while it runs."""

from __future__ import annotations

import asyncio
import ssl
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from dynamo_epp.gateway import Tls
from dynamo_epp.gateway.tls import (
    CertificateFolder,
    InvalidCertificate,
    now,
    self_signed,
    server_context,
)
from dynamo_epp.server import PickerServer

from tests.gateway_epp.conftest import TestPicker


def write(folder: Path, pair: tuple[bytes, bytes]) -> bytes:
    """Put a pair into ``folder`` as a mounted Secret does, in one step each; its certificate."""
    for name, content in zip(("tls.crt", "tls.key"), pair, strict=True):
        (folder / f"new.{name}").write_bytes(content)
        (folder / f"new.{name}").replace(folder / name)
    return pair[0]


def context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def trusting() -> ssl.SSLContext:
    """A client's, as a gateway that verifies nothing has it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


async def shown(host: str) -> bytes:
    """The certificate that the port shows, PEM, spoken as a gateway does."""
    context = trusting()
    _, writer = await asyncio.open_connection(host, 9002, ssl=context)
    try:
        connection = writer.get_extra_info("ssl_object")
        assert connection.selected_alpn_protocol() == "h2"
        return ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True)).encode()
    finally:
        writer.close()


def test_a_self_signed_pair_fits_together(tmp_path: Path) -> None:
    certificate = write(tmp_path, self_signed(now()))
    CertificateFolder(tmp_path, context)
    parsed = x509.load_pem_x509_certificate(certificate)
    assert parsed.not_valid_before_utc < now() < parsed.not_valid_after_utc - timedelta(days=3000)


def test_without_tls_nothing_is_secured() -> None:
    assert server_context(Tls(enabled=False), now()) is None


async def test_replaced_certificates_are_used(own_address: str, tmp_path: Path) -> None:
    first = write(tmp_path, self_signed(now()))
    server = PickerServer(TestPicker(), ready=lambda: True)
    secured = server_context(Tls(cert_path=tmp_path, reload=True), now())
    await server.start(f"{own_address}:9002", tls=secured)
    try:
        assert await shown(own_address) == first
        (tmp_path / "tls.key").write_bytes(self_signed(now())[1])  # does not fit
        assert await shown(own_address) == first
        second = write(tmp_path, self_signed(now()))
        assert await shown(own_address) == second
        (tmp_path / "tls.crt").unlink()
        assert await shown(own_address) == second
    finally:
        await server.stop(0)


def test_nobody_is_asked_for_the_password_of_a_key(tmp_path: Path) -> None:
    certificate, key = self_signed(now())
    private = serialization.load_pem_private_key(key, None)
    locked = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    write(tmp_path, (certificate, locked))
    with pytest.raises(InvalidCertificate, match="are no certificate and its key"):
        CertificateFolder(tmp_path, context)


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        (None, b"", "tls.crt: No such file"),
        (b"nonsense", b"nonsense", "tls.crt and tls.key are no certificate and its key"),
    ],
)
def test_what_can_not_be_used_is_named(
    certificate: bytes | None, key: bytes, said: str, tmp_path: Path
) -> None:
    if certificate is not None:
        (tmp_path / "tls.crt").write_bytes(certificate)
    (tmp_path / "tls.key").write_bytes(key)
    with pytest.raises(InvalidCertificate, match=said):
        server_context(Tls(cert_path=tmp_path), now())


async def test_only_what_was_asked_for_is_spoken(own_address: str) -> None:
    server = PickerServer(TestPicker(), ready=lambda: True)
    suites = ("ECDHE-ECDSA-AES256-GCM-SHA384",)
    await server.start(f"{own_address}:9002", tls=server_context(Tls(ciphers=suites), now()))
    strict = PickerServer(TestPicker(), ready=lambda: True)
    await strict.start(f"{own_address}:9012", tls=server_context(Tls(only_1_3=True), now()))
    try:
        old = trusting()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        _, writer = await asyncio.open_connection(own_address, 9002, ssl=old)
        assert writer.get_extra_info("cipher")[0] == suites[0]
        writer.close()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(own_address, 9012, ssl=old)
        _, writer = await asyncio.open_connection(own_address, 9012, ssl=trusting())
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        writer.close()
    finally:
        await server.stop(0)
        await strict.stop(0)
