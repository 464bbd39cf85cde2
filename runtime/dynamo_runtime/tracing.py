"""Spans for OpenTelemetry: off, and free, unless the environment names a collector.

What is configured how is OpenTelemetry's own: ``OTEL_EXPORTER_OTLP_ENDPOINT`` (spans go there over
OTLP/HTTP), ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_TRACES_SAMPLER``, … The
packages are those of the extra ``otel`` and are imported here, when they are wanted, and nowhere
else. A span is recorded when all of it is known, so that whoever is measured only reads its clock.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

COLLECTOR = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FLUSH_MS = 2000
"""How long an end waits for the collector to take the last spans."""

Attribute = str | bool | int | float


class TracingUnavailable(Exception):
    """Traces are asked for and can't be made; the message says what to do."""


def wanted(environ: Mapping[str, str]) -> str:
    """The variable that asks for traces; "" if none does, or one says that there shall be none."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ""
    if environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none":
        return ""
    return next((name for name in COLLECTOR if environ.get(name, "").strip()), "")


class Tracing:
    """Records spans with ``provider``, each continuing the trace that a request came with."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("dynamo")
        self._api = trace
        self._w3c = TraceContextTextMapPropagator()

    @classmethod
    def from_environment(cls, service: str, environ: Mapping[str, str]) -> Tracing | None:
        """Tracing to the collector that ``environ`` (the process's own) names, or None if none is.

        ``service`` is the service's name unless the environment has another. Raises
        ``TracingUnavailable``.
        """
        variable = wanted(environ)
        if not variable:
            return None
        protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get(
            "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
        )
        if protocol != "http/protobuf":
            raise TracingUnavailable(
                f"{variable} is set, but OTLP over {protocol!r} is not spoken here; "
                "use http/protobuf (a collector's port 4318)"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise TracingUnavailable(
                f"{variable} is set, but the package {error.name!r} is not installed; "
                "use `pip install 'dynamo-platform[otel]'`"
            ) from error
        named = environ.get("OTEL_SERVICE_NAME") or "service.name=" in environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        try:
            resource = Resource.create({} if named else {"service.name": service})
            provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        except (ValueError, TypeError) as error:
            raise TracingUnavailable(f"an OTEL_… variable is wrong: {error}") from error
        log.info("traces go to %s (%s)", environ[variable], variable)
        return cls(provider)

    def record(
        self,
        name: str,
        headers: Mapping[str, str],
        end_ns: int,
        stages: Sequence[tuple[str, float]],
        attributes: Mapping[str, Attribute],
        error: str = "",
    ) -> dict[str, str]:
        """Record a span that ended at ``end_ns`` (Unix nanoseconds), one child for each stage.

        ``stages`` are names and milliseconds, one after the other; the span is as long as they
        are. ``headers`` (lower-case names) are those the request came with: their ``traceparent``
        is continued if it is a valid one. Returns the headers for whoever gets the request next
        (W3C Trace Context, level 1).
        """
        start_ns = end_ns - sum(int(milliseconds * 1e6) for _, milliseconds in stages)
        parent = self._w3c.extract(headers)
        span = self._tracer.start_span(
            name, context=parent, start_time=start_ns, attributes=dict(attributes)
        )
        here = self._api.set_span_in_context(span, parent)
        if span.is_recording():
            begin_ns = start_ns
            for stage, milliseconds in stages:
                child = self._tracer.start_span(stage, context=here, start_time=begin_ns)
                begin_ns += int(milliseconds * 1e6)
                child.end(begin_ns)
            if error:
                span.set_status(self._api.Status(self._api.StatusCode.ERROR, error))
        span.end(end_ns)
        onward: dict[str, str] = {}
        self._w3c.inject(onward, here)
        return onward

    def close(self) -> None:
        """Send what is left and end. Blocks for at most some seconds."""
        self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()


def start(service: str, environ: Mapping[str, str], registry: CollectorRegistry) -> Tracing | None:
    """``Tracing.from_environment`` for a process that works without as well: it says so in a log
    line and in ``dynamo_tracing_failed``."""
    failed = Gauge(
        "dynamo_tracing_failed",
        "1 if traces were asked for and can't be made, else 0; the log says why.",
        registry=registry,
    )
    try:
        return Tracing.from_environment(service, environ)
    except TracingUnavailable as error:
        failed.set(1)
        log.error("no traces: %s", error)
        return None
