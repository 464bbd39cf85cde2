"""Certificates of the webhook: what they are worth, when they are due, what takes their place.

The webhook is its own authority unless it is given certificates. The rules are functions of what is
kept and of the time, so every replica comes to the same conclusion:

- A certificate is due after two thirds of its life; an authority too. A new authority joins the old
  one, which stays trusted until it expires.
- A serving certificate is signed by the newest authority that has been published for
  `PUBLISHED_FOR`; until then by the one before. So whoever verifies has known an authority for a
  day before it is shown one of its certificates, and no request fails at a rotation.
- Who verifies trusts what every replica has asked for, until it expires: replicas learn of new
  certificates one after the other, given ones a minute or more apart.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey

AUTHORITY_LIFE = timedelta(days=3 * 365)
SERVING_LIFE = timedelta(days=90)
PUBLISHED_FOR = timedelta(days=1)
BACKDATED = timedelta(minutes=5)
"""Clocks of a cluster's machines differ a little."""
MOST_OTHERS = 16
"""So many authorities beside one's own stay trusted, the newest: installing anew, again and again,
leaves one behind each time."""

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)
_KEY = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.+?-----END [A-Z ]*PRIVATE KEY-----\n?", re.S
)


class Randomness(Protocol):
    """Where keys and serial numbers come from."""

    def key(self) -> Key: ...

    def serial(self) -> int: ...


class SystemRandomness:
    """The operating system's randomness; P-256 keys."""

    def key(self) -> Key:
        return ec.generate_private_key(ec.SECP256R1())

    def serial(self) -> int:
        return x509.random_serial_number()


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes

    @property
    def parsed(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate)


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that is kept: authorities, oldest first, and the serving certificate."""

    authorities: tuple[Pair, ...]
    serving: Pair

    @property
    def bundle(self) -> bytes:
        """PEM of all authorities: what the API server is told to trust."""
        return b"".join(authority.certificate for authority in self.authorities)


def due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether it is time to replace a certificate: two thirds of its life are over."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= begin + (end - begin) * 2 / 3


def expired(certificate: x509.Certificate, now: datetime) -> bool:
    return now >= certificate.not_valid_after_utc


def renewed(
    kept: Material | None, names: Sequence[str], now: datetime, randomness: Randomness
) -> Material:
    """`kept` with everything replaced that is due; the same object if nothing is.

    `names` are the DNS names and IP addresses that the webhook is called by.
    """
    authorities = () if kept is None else kept.authorities
    authorities = tuple(a for a in authorities if not expired(a.parsed, now))
    if not authorities or due(authorities[-1].parsed, now):
        authorities = (*authorities, _authority(now, randomness))
    signer = _signer(authorities, now)
    if kept is not None and _serves(kept.serving, names, signer, now):
        return kept if authorities == kept.authorities else replace(kept, authorities=authorities)
    return Material(authorities, _serving(signer, names, now, randomness))


def _signer(authorities: Sequence[Pair], now: datetime) -> Pair:
    """The newest authority that everybody has had time to learn; the oldest if there is none."""
    known = [a for a in authorities if now >= _made(a) + PUBLISHED_FOR]
    return known[-1] if known else authorities[0]


def _made(authority: Pair) -> datetime:
    return authority.parsed.not_valid_before_utc + BACKDATED


def _serves(serving: Pair, names: Sequence[str], signer: Pair, now: datetime) -> bool:
    certificate = serving.parsed
    issued = certificate.issuer == signer.parsed.subject
    return issued and set(names) <= names_of(certificate) and not due(certificate, now)


def names_of(certificate: x509.Certificate) -> set[str]:
    """DNS names and IP addresses that a certificate is good for."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return set()
    addresses = extension.value.get_values_for_type(x509.IPAddress)
    return {*extension.value.get_values_for_type(x509.DNSName), *map(str, addresses)}


def is_bundle(pem: bytes) -> bool:
    """Whether there are certificates in `pem`, and all of them can be read."""
    try:
        return bool(x509.load_pem_x509_certificates(pem))
    except ValueError:
        return False


def joined(ours: bytes, present: bytes, now: datetime) -> bytes:
    """PEM of the authorities to trust, oldest first: `ours`, and of those that are trusted at
    `present` the newest `MOST_OTHERS` that have not expired. So replicas that hold different
    authorities for a while take nothing from each other, and come to the same bytes.

    Raises `ValueError` if there are no certificates in `ours`; what can't be read in `present` is
    dropped.
    """
    own = set(x509.load_pem_x509_certificates(ours))
    others = [c for c in _readable(present) if c not in own and not expired(c, now)]
    trusted = own.union(sorted(others, key=_age)[-MOST_OTHERS:])
    pem = serialization.Encoding.PEM
    return b"".join(certificate.public_bytes(pem) for certificate in sorted(trusted, key=_age))


def _readable(bundle: bytes) -> set[x509.Certificate]:
    found: set[x509.Certificate] = set()
    for block in _CERTIFICATE.findall(bundle):
        with contextlib.suppress(ValueError):
            found.add(x509.load_pem_x509_certificate(block))
    return found


def _age(certificate: x509.Certificate) -> tuple[datetime, bytes]:
    return certificate.not_valid_before_utc, certificate.fingerprint(hashes.SHA256())


# --- making them ----------------------------------------------------------------------------------


def _authority(now: datetime, randomness: Randomness) -> Pair:
    key, serial = randomness.key(), randomness.serial()
    # Authorities live side by side, so each needs a name of its own.
    name = _name(f"dynamo-operator-webhook-ca-{serial:x}"[:64])
    builder = _builder(name, name, key, now, AUTHORITY_LIFE, serial)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return _pair(builder.sign(key, hashes.SHA256()), key)


def _serving(authority: Pair, names: Sequence[str], now: datetime, randomness: Randomness) -> Pair:
    key, issuer = randomness.key(), authority.parsed
    life = min(SERVING_LIFE, issuer.not_valid_after_utc - now)
    builder = _builder(
        _name("dynamo-operator-webhook"), issuer.subject, key, now, life, randomness.serial()
    )
    builder = builder.add_extension(
        x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
    )
    builder = builder.add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    signing_key = _loaded_key(authority.key)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    return _pair(builder.sign(signing_key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: Key,
    now: datetime,
    life: timedelta,
    serial: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pair(certificate: x509.Certificate, key: Key) -> Pair:
    pem = serialization.Encoding.PEM
    return Pair(
        certificate.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _loaded_key(pem: bytes) -> Key:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic-curve key")
    return key


# --- as files -------------------------------------------------------------------------------------


def to_files(material: Material) -> dict[str, bytes]:
    """The keys of a Secret: `tls.crt`, `tls.key`, `ca.crt`, `ca.key`; authorities in one order."""
    return {
        "tls.crt": material.serving.certificate,
        "tls.key": material.serving.key,
        "ca.crt": material.bundle,
        "ca.key": b"".join(authority.key for authority in material.authorities),
    }


def from_files(files: dict[str, bytes]) -> Material | None:
    """What `to_files` wrote; None if it is not that, or has been tampered with."""
    certificates = _CERTIFICATE.findall(files.get("ca.crt", b""))
    keys = _KEY.findall(files.get("ca.key", b""))
    if not certificates or len(certificates) != len(keys):
        return None
    authorities = tuple(Pair(c, k) for c, k in zip(certificates, keys, strict=True))
    serving = Pair(files.get("tls.crt", b""), files.get("tls.key", b""))
    try:
        for pair in (*authorities, serving):
            if pair.parsed.public_key() != _loaded_key(pair.key).public_key():
                return None
    except (ValueError, TypeError):
        return None
    return Material(authorities, serving)
