"""Traces: wanted only when a collector is named, and they arrive there."""

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from dynamo_runtime import tracing
from dynamo_runtime.tracing import Tracing, TracingUnavailable, wanted
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import CollectorRegistry


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t:4318/v1/traces",
            },
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, ""),
    ],
)
def test_traces_are_wanted_when_a_collector_is_named(
    environ: dict[str, str], variable: str
) -> None:
    assert wanted(environ) == variable


def test_a_process_that_can_not_trace_says_so_and_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = CollectorRegistry()
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    }
    assert tracing.start("p", environ, registry) is None
    assert registry.get_sample_value("dynamo_tracing_failed") == 1
    assert "use http/protobuf" in caplog.text


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.delitem(sys.modules, name, raising=False)

    class Missing:
        def find_spec(self, fullname: str, *_: object) -> None:
            if fullname == name:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(TracingUnavailable, match=r"dynamo-platform\[otel\]"):
        Tracing.from_environment("p", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})


def test_no_traces_are_no_failure_when_no_traces_are_wanted() -> None:
    registry = CollectorRegistry()
    assert tracing.start("p", {}, registry) is None
    assert registry.get_sample_value("dynamo_tracing_failed") == 0


@pytest.fixture
async def collector() -> AsyncIterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """(URL, what it was sent) of an OTLP/HTTP collector on loopback."""
    sent: list[ExportTraceServiceRequest] = []

    async def traces(request: web.Request) -> web.Response:
        sent.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", traces)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}", sent
    await runner.cleanup()


async def test_spans_arrive_at_the_collector(
    collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sent = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    traces = Tracing.from_environment("picker", {"OTEL_EXPORTER_OTLP_ENDPOINT": url})
    assert traces is not None
    traces.record("pick", {}, 10**18, [("parse", 1.5), ("choose", 0.5)], {"a": 1}, "because")
    await asyncio.to_thread(traces.close)
    (resource,) = sent[0].resource_spans
    service = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert service["service.name"] == "picker"
    spans = {span.name: span for span in resource.scope_spans[0].spans}
    assert spans.keys() == {"pick", "parse", "choose"}
    pick, parse = spans["pick"], spans["parse"]
    assert (pick.end_time_unix_nano, pick.start_time_unix_nano) == (10**18, 10**18 - 2_000_000)
    assert parse.end_time_unix_nano - parse.start_time_unix_nano == 1_500_000
    assert parse.parent_span_id == pick.span_id
    assert pick.status.message == "because"
