"""How to reach the API server, and as whom: from inside a pod, or with a kubeconfig file.

In a pod everything lies in three files and two variables, read here in a few lines, so that a
picker's image needs no Kubernetes library. Kubeconfig files know a dozen ways to log in (exec
plugins, OIDC, client certificates); those are left to `kubernetes_asyncio`, imported only here.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from yaml import YAMLError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_READ_EVERY_S = 60.0
"""The kubelet replaces a pod's token after four fifths of its life (an hour by default)."""


class NoCluster(Exception):
    """Nothing says where the API server is, or what says so can't be used; the message names it."""


class Access:
    """An API server and how a request authenticates there.

    As it is: no authentication, for test servers. ``url`` has no slash at its end.
    """

    def __init__(self, url: str, namespace: str = "default") -> None:
        self.url = url
        self.namespace = namespace
        self.tls: ssl.SSLContext | None = None
        self.server_hostname: str | None = None
        """Name to verify in the server's certificate, where it is not the URL's."""
        self.proxy: str | None = None

    def authorization(self) -> str | None:
        """Value of the Authorization header of the next request. Never log it."""
        return None

    async def renew(self) -> None:
        """A request was answered 401: get what has replaced the old credentials."""


class PodAccess(Access):
    """As the service account of the pod that this process runs in."""

    def __init__(
        self,
        environment: Mapping[str, str],
        folder: Path = SERVICE_ACCOUNT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ``NoCluster`` outside of a pod."""
        host = environment.get("KUBERNETES_SERVICE_HOST")
        port = environment.get("KUBERNETES_SERVICE_PORT_HTTPS") or environment.get(
            "KUBERNETES_SERVICE_PORT", "443"
        )
        if not host:
            raise NoCluster("KUBERNETES_SERVICE_HOST is not set: this process runs in no pod")
        self._token_file = folder / "token"
        self._clock = clock
        self._token = ""
        self._read_at = 0.0
        try:
            namespace = (folder / "namespace").read_text().strip()
            self._read_token()
            context = tls_context(str(folder / "ca.crt"))
        except (OSError, ssl.SSLError) as error:
            raise NoCluster(
                f"this pod has no usable service account: {error}; does its spec set "
                "automountServiceAccountToken: false?"
            ) from error
        super().__init__(f"https://{f'[{host}]' if ':' in host else host}:{port}", namespace)
        self.tls = context

    def _read_token(self) -> None:
        self._token = self._token_file.read_text().strip()
        self._read_at = self._clock()

    def authorization(self) -> str:
        if self._clock() - self._read_at >= TOKEN_READ_EVERY_S:
            try:
                self._read_token()
            except OSError:  # being replaced: the old one is good for minutes
                self._read_at = self._clock()
        return f"Bearer {self._token}"

    async def renew(self) -> None:
        self._read_at -= TOKEN_READ_EVERY_S


class KubeconfigAccess(Access):
    """As a context of a kubeconfig file says; made by ``load``."""

    def __init__(self, loader: Any, configuration: Any) -> None:
        """``loader`` has filled ``configuration``, both of `kubernetes_asyncio`."""
        context = (loader.current_context or {}).get("context") or {}
        super().__init__(configuration.host.rstrip("/"), context.get("namespace") or "default")
        self._loader = loader
        self._configuration = configuration
        self._files: tuple[str | None, ...] = ()
        self._adopt()

    @classmethod
    async def load(
        cls, kubeconfig: Path | None = None, context: str | None = None
    ) -> KubeconfigAccess:
        """Read ``kubeconfig``, else the files that $KUBECONFIG lists, else ~/.kube/config.

        Raises ``NoCluster``.
        """
        named = str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG", "")
        paths = named or str(Path.home() / ".kube" / "config")
        if not any(Path(path).expanduser().is_file() for path in paths.split(os.pathsep) if path):
            raise NoCluster(f"{paths}: no such kubeconfig file")
        try:
            from kubernetes_asyncio.client import Configuration
            from kubernetes_asyncio.config import ConfigException, load_kube_config
        except ImportError as error:
            raise NoCluster(
                "kubeconfig files need the package kubernetes-asyncio (extra: operator)"
            ) from error
        configuration = Configuration()
        try:
            loader = await load_kube_config(
                config_file=paths, context=context, client_configuration=configuration
            )
            return cls(loader, configuration)
        except (ConfigException, OSError, ValueError, TypeError, KeyError, YAMLError) as error:
            raise NoCluster(f"{paths}: {error}") from error

    def _adopt(self) -> None:
        configuration = self._configuration
        self.server_hostname = configuration.tls_server_name or None
        self.proxy = configuration.proxy or None
        files = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
        # Open connections are reused under the same context only.
        if self.url.startswith("https") and files != self._files:
            self.tls = tls_context(*files, verify=configuration.verify_ssl)
            self._files = files

    def authorization(self) -> str | None:
        token = self._configuration.api_key.get("BearerToken")
        return None if token is None else str(token)

    async def renew(self) -> None:
        await self._loader.load_and_set(self._configuration)
        self._adopt()


async def access_from(
    environment: Mapping[str, str], *, kubeconfig: Path | None = None, context: str | None = None
) -> Access:
    """A kubeconfig that is named wins, then the pod, then ~/.kube/config. Raises ``NoCluster``."""
    named = kubeconfig is not None or context is not None or environment.get("KUBECONFIG")
    if not named and environment.get("KUBERNETES_SERVICE_HOST"):
        return PodAccess(environment)
    return await KubeconfigAccess.load(kubeconfig, context)


def tls_context(
    ca: str | None, certificate: str | None = None, key: str | None = None, *, verify: bool = True
) -> ssl.SSLContext:
    """A context that trusts ``ca`` (else the system) and shows ``certificate``."""
    context = ssl.create_default_context(cafile=ca)
    # Python 3.13's default refuses certificates without key identifiers, which many clusters have.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if certificate:
        context.load_cert_chain(certificate, key)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
