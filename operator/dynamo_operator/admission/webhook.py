"""The process `dynamo operator webhook`: certificates, server, readiness.

Ready means: it serves a valid certificate, and the API server knows whom to trust. A step that
fails is tried again; what was in place stays in place meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dynamo_crds.generate import WebhookService
from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.lifecycle import Lifecycle
from dynamo_runtime.status import AddressInUse, StatusServer
from prometheus_client import CollectorRegistry

from dynamo_operator.admission.bundle import CrdMissing, NotInPlace, publish
from dynamo_operator.admission.keeper import FileKeeper, Keeper, NoCertificate, SecretKeeper, Served
from dynamo_operator.admission.metrics import WebhookMetrics
from dynamo_operator.admission.server import Reviewer, Rules, WebhookServer
from dynamo_operator.install.crds import ForeignCrds, apply_crds
from dynamo_operator.install.settings import OPERATOR, WEBHOOK

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WebhookSettings:
    """What `dynamo operator webhook` is told."""

    rules: Rules
    """How reviews are answered."""
    namespace: str
    """Namespace of this process, of its Secret and its Service."""
    service: str = WEBHOOK
    """Service by which the API server calls it."""
    configuration: str = OPERATOR
    """ValidatingWebhookConfiguration that names it."""
    names: tuple[str, ...] = ()
    """Further DNS names and addresses by which it is called."""
    certificates: Path | None = None
    """Folder with certificates that somebody else keeps; None: it makes its own."""
    conversion: bool = True
    """Whether the CRDs' conversion is this webhook's: no, for an operator of some namespaces."""
    installs_crds: bool = False
    """Whether it installs and updates the CRDs when it starts."""
    host: str = "0.0.0.0"
    """Address to listen on."""
    port: int = 9443
    """Port of the webhook."""
    status_host: str = "0.0.0.0"
    """Address of probes and metrics."""
    status_port: int = 9090
    """Port of probes and metrics."""
    look_every_s: float = 60.0
    """Time between looks at the certificate, once all is in place."""
    retry_every_s: float = 2.0
    """Time between looks while something is missing."""
    drain_accept_s: float = 5.0
    """On SIGTERM, reviews are still taken so long, until the API server knows."""

    @property
    def dns_names(self) -> tuple[str, ...]:
        """Everything that the serving certificate must be good for."""
        service = f"{self.service}.{self.namespace}"
        return (service, f"{service}.svc", f"{service}.svc.cluster.local", *self.names)


class Webhook:
    """The parts of the process and what makes it ready; `step` brings it forward."""

    def __init__(
        self,
        settings: WebhookSettings,
        client: KubernetesClient,
        lifecycle: Lifecycle,
        registry: CollectorRegistry,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._settings = settings
        self._client = client
        self._lifecycle = lifecycle
        self._now = now
        metrics = WebhookMetrics(registry)
        reviewer = Reviewer(client, settings.rules, metrics, now)
        self.server = WebhookServer(reviewer, metrics, settings.host, settings.port)
        self._keeper: Keeper = (
            SecretKeeper(client, settings.namespace, settings.dns_names)
            if settings.certificates is None
            else FileKeeper(settings.certificates)
        )
        self._crds_installed = not settings.installs_crds
        self._served: Served | None = None
        self._trusted: bytes | None = None
        """The authorities that were in place at the last look."""

    async def step(self) -> bool:
        """Bring everything up to date; whether it is ready. Raises `ForeignCrds`."""
        missing = ""
        try:
            await self._forward()
        except ApiError as error:
            missing = f"the API server: {error}"
        except CrdMissing as error:
            missing = str(error)
            self._crds_installed = not self._settings.installs_crds  # anew, at the next step
            self._lifecycle.set_not_ready(missing)
        except (NoCertificate, NotInPlace, ssl.SSLError) as error:
            missing = str(error)
        if missing and self._still_good():
            log.warning("%s; what is in place goes on", missing)
            return False
        if missing:
            if missing != self._lifecycle.reason:
                log.warning("not ready: %s", missing)
            self._lifecycle.set_not_ready(missing)
            return False
        self._lifecycle.set_ready()
        return True

    def _still_good(self) -> bool:
        served = self._served
        return self._lifecycle.ready and served is not None and self._now() < served.expires

    async def _forward(self) -> None:
        """Returns once everything is in place; raises where it can't be."""
        if not self._crds_installed:
            await self._install_crds()
        served = await self._keeper.current(self._now())
        serving = self._served
        if serving is None:
            serving = served
            self._use(served)
            await self.server.start()
        if served.bundle:
            changed = await publish(
                self._client,
                served.bundle,
                self._settings.configuration,
                self._now(),
                conversion=self._settings.conversion,
            )
            for name in changed:
                log.info("told the API server whom to trust: %s", name)
        # Shown at the look after the one that found it trusted: API servers, of which there may be
        # several, learn of a change one after the other.
        known = served.bundle == self._trusted or self._now() >= serving.expires
        self._trusted = served.bundle
        if served != serving and known:
            self._use(served)

    def _use(self, served: Served) -> None:
        self.server.use(served)
        self._served = served
        log.info("serving a certificate that is good until %s", served.expires)

    async def _install_crds(self) -> None:
        service = WebhookService(self._settings.namespace, self._settings.service)
        for applied in await apply_crds(
            self._client, service if self._settings.conversion else None
        ):
            log.info("CustomResourceDefinition %s: %s", applied.name, applied.result)
        self._crds_installed = True


async def run_webhook(
    settings: WebhookSettings, client: KubernetesClient, lifecycle: Lifecycle
) -> int:
    """Serve until a stop is requested, then drain; the exit status."""
    registry = CollectorRegistry()
    status = StatusServer(lifecycle, registry, settings.status_host, settings.status_port)
    webhook = Webhook(settings, client, lifecycle, registry)
    stop = lifecycle.stop_requested
    try:
        await status.start()
        while not stop.is_set():
            ready = await webhook.step()
            wait_s = settings.look_every_s if ready else settings.retry_every_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), wait_s)
        webhook.server.close_connections()
        await asyncio.sleep(settings.drain_accept_s)
        return 0
    except (AddressInUse, ForeignCrds) as error:
        log.error("%s", error)
        return 1
    finally:
        await webhook.server.stop()
        await status.stop()
