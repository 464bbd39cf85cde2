"""Where the webhook's certificates are kept: in a Secret that it makes itself, or in given files.

Both give the same thing, a `Served`: what to show to clients and what they are to trust.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cryptography import x509
from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.resources import SECRETS

from dynamo_operator.admission.certificates import (
    Material,
    Randomness,
    SystemRandomness,
    from_files,
    is_bundle,
    renewed,
    to_files,
)
from dynamo_operator.admission.review import Json
from dynamo_operator.install.rights import labels
from dynamo_operator.install.settings import CERTIFICATE, WEBHOOK

log = logging.getLogger(__name__)

ATTEMPTS = 5


class NoCertificate(Exception):
    """There is no certificate that could be served; the message says why."""


@dataclass(frozen=True, slots=True)
class Served:
    """PEM: certificate chain, private key, and the authorities that clients are to trust (empty
    if somebody else tells them)."""

    chain: bytes
    key: bytes
    bundle: bytes

    @property
    def expires(self) -> datetime:
        return x509.load_pem_x509_certificate(self.chain).not_valid_after_utc


class Keeper(Protocol):
    """Gives the certificate to serve at `now`, renewed if it was due. Raises `NoCertificate`,
    or `ApiError` if the API server is needed and does not answer."""

    async def current(self, now: datetime) -> Served: ...


class SecretKeeper:
    """Certificates of our own in a Secret, which all replicas share; who is first makes it."""

    def __init__(
        self,
        client: KubernetesClient,
        namespace: str,
        names: Sequence[str],
        randomness: Randomness | None = None,
    ) -> None:
        """`names` are the DNS names and IP addresses that the webhook is called by."""
        self._client = client
        self._namespace = namespace
        self._names = tuple(names)
        self._randomness = randomness or SystemRandomness()
        self._last: Material | None = None
        """What was kept at the last look: a Secret that somebody deletes comes back as it was."""

    async def current(self, now: datetime) -> Served:
        for _ in range(ATTEMPTS):
            secret = await self._read()
            kept = None if secret is None else _material(secret)
            if secret is not None and kept is None:
                log.warning("Secret %s holds no certificates of ours: writing it anew", CERTIFICATE)
            wanted = renewed(kept or self._last, self._names, now, self._randomness)
            if wanted == kept or await self._written(secret, wanted):
                self._last = wanted
                served = wanted.serving
                return Served(served.certificate, served.key, wanted.bundle)
        raise NoCertificate(f"Secret {CERTIFICATE} is changed faster than it can be read")

    async def _read(self) -> Json | None:
        try:
            return await self._client.get(SECRETS.path(self._namespace, CERTIFICATE))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _written(self, before: Json | None, material: Material) -> bool:
        """Whether the Secret is as wanted now; not, if another replica was faster."""
        secret: Json = before or {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": CERTIFICATE,
                "namespace": self._namespace,
                "labels": labels(WEBHOOK),
            },
            "type": "kubernetes.io/tls",
        }
        data = {name: base64.b64encode(pem).decode() for name, pem in to_files(material).items()}
        secret = {**secret, "data": data}
        try:
            if before is None:
                await self._client.create(secret)
            else:
                await self._client.replace(SECRETS.path(self._namespace, CERTIFICATE), secret)
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        log.info("wrote new certificates to Secret %s", CERTIFICATE)
        return True


def _material(secret: Json) -> Material | None:
    try:
        files = {
            name: base64.b64decode(text, validate=True)
            for name, text in (secret.get("data") or {}).items()
        }
    except (binascii.Error, ValueError):
        return None
    return from_files(files)


class FileKeeper:
    """Certificates that somebody else keeps in a folder, cert-manager for instance: `tls.crt`,
    `tls.key` and, if the API server is to be told whom to trust, `ca.crt`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def current(self, now: datetime) -> Served:
        try:
            chain = (self._folder / "tls.crt").read_bytes()
            key = (self._folder / "tls.key").read_bytes()
            authorities = self._folder / "ca.crt"
            bundle = authorities.read_bytes() if authorities.is_file() else b""
            served = Served(chain, key, bundle)
            if now >= served.expires:
                raise NoCertificate(f"{self._folder / 'tls.crt'} expired at {served.expires}")
            if bundle and not is_bundle(bundle):
                raise NoCertificate(f"{authorities}: no certificates in PEM")
        except OSError as error:
            raise NoCertificate(f"{error.filename}: {error.strerror}") from error
        except ValueError as error:
            raise NoCertificate(f"{self._folder / 'tls.crt'}: {error}") from error
        return served
