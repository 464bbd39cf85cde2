"""The HTTPS server that the API server calls: `/validate` and `/convert`.

Bytes in, bytes out; what is decided stands in `policy` and `conversion`. A review that fails here
for a reason of ours is answered with an error, and the API server then goes by the configured
`failurePolicy`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from dynamo_runtime.kubernetes.client import KubernetesClient
from dynamo_runtime.status import bind

from dynamo_operator.admission import conversion, dry_run, scope
from dynamo_operator.admission.keeper import Served
from dynamo_operator.admission.metrics import ALLOWED, DENIED, FAILED, WebhookMetrics
from dynamo_operator.admission.policy import denied_by, judge
from dynamo_operator.admission.review import (
    CREATE,
    UPDATE,
    Json,
    Malformed,
    Request,
    answer,
    read_request,
)
from dynamo_operator.admission.wording import Wording
from dynamo_operator.render import Platform

log = logging.getLogger(__name__)

LARGEST_BODY = 512 * 1024 * 1024
"""A conversion review carries a whole list of objects."""
CONVERT = "CONVERT"


@dataclass(frozen=True, slots=True)
class Rules:
    """How reviews are answered."""

    platform: Platform
    """What graphs are rendered for; as the operator's."""
    dry_run_limit_s: float = 3.0
    """Longest time for trying rendered objects; 0 tries none."""
    respects_scope: bool = True
    """Whether namespaces with an operator of their own are let pass unreviewed."""


class Reviewer:
    """Answers admission reviews: policy, then the API server's own word on rendered objects."""

    def __init__(
        self,
        client: KubernetesClient,
        rules: Rules,
        metrics: WebhookMetrics,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._rules = rules
        self._metrics = metrics
        self._marks = scope.Marks(client)
        self._now = now

    async def review(self, body: Any) -> Json:
        """The AdmissionReview that answers `body`. Raises `Malformed`."""
        request = read_request(body)
        labels = (request.kind, request.operation)
        began = time.monotonic()
        result = FAILED
        try:
            reply = await self._decide(request)
            result = ALLOWED if reply["response"]["allowed"] else DENIED
        finally:
            self._metrics.requests.labels(*labels, result).inc()
            self._metrics.duration.labels(*labels).observe(time.monotonic() - began)
        return reply

    async def _decide(self, request: Request) -> Json:
        if request.operation not in (CREATE, UPDATE) or await self._belongs_elsewhere(request):
            return answer(request, (), ())
        verdict = judge(request, self._rules.platform)
        denials, warnings = verdict.denials, verdict.warnings
        if not denials and verdict.trials and self._rules.dry_run_limit_s > 0:
            version = str((request.object or {}).get("apiVersion"))
            outcome = await dry_run.dry_run(
                self._client, verdict.trials, Wording(version), self._rules.dry_run_limit_s
            )
            denials, warnings = outcome.denials, (*warnings, *outcome.warnings)
        for reason in denied_by(denials):
            self._metrics.denials.labels(request.kind, request.operation, reason).inc()
        return answer(request, denials, warnings)

    async def _belongs_elsewhere(self, request: Request) -> bool:
        if not self._rules.respects_scope or not request.namespace:
            return False
        return await self._marks.hold(request.namespace, self._now())


class WebhookServer:
    """HTTPS for the API server. Certificates can be exchanged while it runs."""

    def __init__(
        self, reviewer: Reviewer, metrics: WebhookMetrics, host: str = "0.0.0.0", port: int = 9443
    ) -> None:
        self.host = host
        self.port = port
        self._metrics = metrics
        self._reviewer = reviewer
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._runner: web.AppRunner | None = None
        self._closing = False

    def use(self, served: Served) -> None:
        """Serve this certificate to every connection from now on. Raises `ssl.SSLError`."""
        # OpenSSL reads files only; the key is on disk for an instant, in a folder of our own.
        with tempfile.TemporaryDirectory(prefix="dynamo-webhook-") as folder:
            chain, key = Path(folder, "tls.crt"), Path(folder, "tls.key")
            key.touch(mode=0o600)
            key.write_bytes(served.key)
            chain.write_bytes(served.chain)
            self._tls.load_cert_chain(chain, key)
        self._metrics.certificate_expiry.set(served.expires.timestamp())

    async def start(self) -> None:
        """Listen; `use` comes first. Raises `dynamo_runtime.status.AddressInUse`."""
        app = web.Application(client_max_size=LARGEST_BODY)
        app.router.add_post("/validate", self._validate)
        app.router.add_post("/convert", self._convert)
        sock = bind(self.host, self.port)
        self.port = sock.getsockname()[1]
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=15.0
        )
        await self._runner.setup()
        await web.SockSite(self._runner, sock, ssl_context=self._tls).start()
        log.info("webhook on https://%s:%d", self.host, self.port)

    def close_connections(self) -> None:
        """Ask clients, answer by answer, to connect anew: to another replica."""
        self._closing = True

    async def stop(self) -> None:
        """Let running reviews end, then close."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _validate(self, request: web.Request) -> web.Response:
        return await self._answered(request, self._reviewer.review)

    async def _convert(self, request: web.Request) -> web.Response:
        return await self._answered(request, self._converted)

    async def _converted(self, body: Any) -> Json:
        kind = _kind_of_first(body)
        began = time.monotonic()
        result = FAILED
        try:
            # A list of thousands takes seconds: in a thread, so that reviews and probes go on.
            reply = await asyncio.to_thread(conversion.answer, body)
            outcome = reply["response"]["result"]
            if outcome["status"] == "Success":
                result = ALLOWED
            else:
                log.warning("%s", outcome["message"])
        finally:
            self._metrics.requests.labels(kind, CONVERT, result).inc()
            self._metrics.duration.labels(kind, CONVERT).observe(time.monotonic() - began)
        return reply

    async def _answered(
        self, request: web.Request, reply: Callable[[Any], Awaitable[Json]]
    ) -> web.Response:
        try:
            body = msgspec.json.decode(await request.read())
            response = web.json_response(
                body=msgspec.json.encode(await reply(body)), content_type="application/json"
            )
        except (msgspec.DecodeError, Malformed) as error:
            response = web.Response(status=400, text=f"{error}\n")
        except Exception:
            log.exception("a review on %s failed", request.path)
            response = web.Response(status=500, text="the review failed; see the webhook's log\n")
        if self._closing:
            response.force_close()
        return response


def _kind_of_first(body: Any) -> str:
    try:
        return str(body["request"]["objects"][0]["kind"])
    except (KeyError, IndexError, TypeError):
        return ""
