"""What the picker tells of requests beside its answers: journal, access log, spans, labels."""

import asyncio
import json
import logging
import random
from typing import Any

import pytest
from dynamo_epp.admission.settings import (
    FlowControlSettings,
    IdentitySettings,
    RateLimit,
    RateLimits,
)
from dynamo_epp.endpoints.breaker import BreakerSettings
from dynamo_epp.endpoints.circuits import Circuits
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.explain import Entry, Refused
from dynamo_epp.extproc import PickRequest, Refusal, RequestHead, Route
from dynamo_epp.metrics import MAX_MODELS, OTHER, PickerMetrics
from dynamo_epp.models.rules import ModelRules, Rule
from dynamo_epp.picker.bookings import LATE_S
from dynamo_epp.picker.reading import INLINE_BODY
from dynamo_epp.pool_metrics import PoolMetrics
from dynamo_epp.server import AccessEntry
from dynamo_kv_router.stream.format import Finished
from dynamo_runtime.tracing import Tracing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from tests.gateway_epp.scene import scene

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [r.__dict__["fields"] for r in caplog.records if r.name == "access"]


@pytest.fixture(autouse=True)
def _access_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "access")


def logged(request_id: str, status: int = 200, **changed: Any) -> AccessEntry:
    fields: dict[str, Any] = {
        "method": "POST",
        "path": "/v1/chat/completions",
        "flags": (),
        "details": "via_upstream",
        "upstream": "10.0.0.1:8000",
        "attempts": 1,
        "first_byte_s": 0.1,
        "last_byte_s": 0.25,
        "request_bytes": 1,
        "response_bytes": 1,
        "routing": "",
    }
    return AccessEntry(request_id=request_id, status=status, **{**fields, **changed})


# --- bodies


@pytest.mark.parametrize("any_path", [False, True])
@pytest.mark.parametrize("named", ["m", "nice"])
async def test_no_depth_hides_transfer_parameters_or_leaves_a_booking(
    named: str, any_path: bool
) -> None:
    s = await scene(any_path=any_path)
    s.picker.rules = ModelRules(exact={"nice": Rule((("m", 1),), "r")})
    statuses = set()
    filler = "x" * INLINE_BODY  # read on a thread, whose stack is shallower
    for depth in range(900, 1100, 2):
        fields = {"model": named, "kv_transfer_params": {}, "messages": [{"role": filler}]}
        body = json.dumps(fields)[:-1] + ',"y":' + "[" * depth + "]" * depth + "}"
        answer = await s.ask(f"r-{depth}", body.encode())
        if isinstance(answer, Refusal):
            statuses.add(answer.status)
            continue
        assert answer.body is not None
        assert b"kv_transfer_params" not in answer.body
        s.picker.released(answer)
    assert statuses <= {400}
    assert not any(worker.load.booked for worker in s.pool.workers.values())


# --- models that nobody serves at the moment


async def test_with_any_path_a_model_that_is_expected_waits_and_others_go_by_load() -> None:
    s = await scene(any_path=True, flow_control=FlowControlSettings(models=("asleep",)))
    messages = [{"role": "user", "content": "x"}]
    known = json.dumps({"model": "asleep", "messages": messages}).encode()
    other = json.dumps({"model": "other", "messages": messages}).encode()
    assert isinstance(await s.ask("other", other), Route)
    taken_by_load = s.journal.get("other")
    assert taken_by_load is not None
    assert taken_by_load.model == ""
    asking = asyncio.create_task(s.ask("known", known))
    await asyncio.sleep(0)
    assert not asking.done()
    awake = s.pool.workers["w-1"]
    awake.models = frozenset({"asleep"})
    route = await asking
    assert isinstance(route, Route)
    assert route.endpoints == (awake.hostport,)


# --- circuits


async def test_an_answer_that_broke_off_is_no_success_of_its_endpoint() -> None:
    workers: list[Worker] = []
    circuits = Circuits(BreakerSettings(consecutive_failures=3), lambda: workers, random.Random(0))
    s = await scene(relays=True, circuits=circuits)
    workers.extend(s.pool.workers.values())
    worker = s.pool.workers["w-1"]
    for status, complete in ((503, True), (503, True), (200, False), (503, True)):
        route = await s.ask()
        assert isinstance(route, Route)
        route.status, route.complete, route.served = status, complete, worker.hostport
        s.picker.answered(route)
        s.picker.released(route)
    assert worker.breaker.blocks(s.now[0]).startswith("circuit open: 3 failures in a row")


# --- the access log


async def test_a_line_has_the_decision_and_how_the_request_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    s = await scene(access_log=True)
    route = await s.ask()
    assert isinstance(route, Route)
    s.now[0] = 0.5
    worker = s.pool.workers["w-1"]
    s.picker.on_first_token(worker, "p-1")
    s.picker.on_finished(worker, Finished("p-1", 8, 4, 3))
    s.picker.released(route)
    assert not lines(caplog)  # Envoy has not told yet
    s.picker.on_access_log(logged("r"))
    assert lines(caplog) == [
        {
            "request_id": "r",
            "path": "/v1/chat/completions",
            "model": "m",
            "stream": False,
            "how": "exact",
            "mode": "kv",
            "reason": "",
            "worker": "w-1",
            "overlap_blocks": 1,
            "blocks": 2,
            "prompt_tokens": 8,
            "predicted_cached_tokens": 4,
            "status": 200,
            "attempts": 1,
            "upstream": "10.0.0.1:8000",
            "cached_tokens": 4,
            "completion_tokens": 3,
            "ttft_s": 0.5,
            "duration_s": 0.25,
        }
    ]


async def test_there_are_no_lines_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    s = await scene()
    await s.ask()
    s.picker.on_access_log(logged("r"))
    assert not lines(caplog)


async def test_refusals_and_what_the_proxy_answered_have_lines_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    s = await scene(access_log=True)
    await s.ask("bad", b"{")
    s.picker.on_access_log(logged("bad", 400))
    s.picker.on_access_log(
        logged("large", 413, details="request_payload_too_large", path="/" + "x" * 1000)
    )
    bad, large = lines(caplog)
    assert (bad["how"], bad["reason"], bad["status"]) == ("refused", "bad-request", 400)
    assert (large["how"], large["status"]) == ("proxy", 413)
    assert large["reason"] == "request_payload_too_large"
    assert len(large["path"]) < 300


@pytest.mark.parametrize("order", ["worker first", "stream first", "worker silent", "stock"])
async def test_a_relayed_request_has_one_line_when_all_is_told(
    caplog: pytest.LogCaptureFixture, order: str
) -> None:
    s = await scene(access_log=True, relays=True, stream_port=None if order == "stock" else 5557)
    route = await s.ask()
    assert isinstance(route, Route)
    route.status, route.served = 200, "10.0.0.1:8000"
    worker, end = s.pool.workers["w-1"], Finished("p-1", 8, 4, 3)
    s.now[0] = 2.0
    match order:
        case "worker first":
            s.picker.on_finished(worker, end)
            s.picker.released(route)
        case "stream first":
            s.picker.released(route)
            assert not lines(caplog)
            s.picker.on_finished(worker, end)
        case "worker silent":
            s.picker.released(route)
            s.now[0] = 2.0 + LATE_S
            other = await s.ask("other")
            assert isinstance(other, Route)
            s.picker.released(other)
        case "stock":
            s.picker.released(route)
    (line,) = lines(caplog)
    assert (line["status"], line["upstream"], line["duration_s"]) == (200, "10.0.0.1:8000", 2.0)
    assert line.get("cached_tokens") == (4 if order.endswith("first") else None)


# --- refusals in the journal


async def test_a_refused_request_can_be_explained() -> None:
    s = await scene()
    await s.ask("bad", b"{")
    await s.ask("unknown", json.dumps({"model": "<b>", "messages": []}).encode())
    bad, unknown = s.journal.find("bad"), s.journal.find("unknown")
    assert isinstance(bad, Refused)
    assert isinstance(unknown, Refused)
    assert bad.outcome == {"status": 400, "dropped_reason": "bad-request"}
    assert (unknown.model, unknown.reason) == ("<b>", "unknown-model")
    assert "does not exist" in unknown.message


async def test_a_refusal_at_the_gate_names_the_tenant(caplog: pytest.LogCaptureFixture) -> None:
    limits = RateLimits(RateLimit(requests_per_s=1, burst_s=1))
    settings = FlowControlSettings(limits=limits, identity=IdentitySettings(tenant_header="x-team"))
    tracing, exporter = traced()
    s = await scene(flow_control=settings, access_log=True, tracing=tracing)
    for request_id in ("first", "second"):
        await s.ask(request_id, headers={"x-team": "a"})
        s.picker.on_access_log(logged(request_id))
    first, second = s.journal.find("first"), s.journal.find("second")
    assert isinstance(first, Entry)
    assert isinstance(second, Refused)
    assert (first.tenant, second.tenant, second.model) == ("a", "a", "m")
    assert [line["tenant"] for line in lines(caplog)] == ["a", "a"]
    pick = exporter.get_finished_spans()[-1]
    assert pick.attributes is not None
    assert pick.attributes["dynamo.tenant"] == "a"
    assert pick.attributes["http.response.status_code"] == 429


async def test_a_client_that_leaves_while_it_waits_is_told_of() -> None:
    s = await scene()
    s.pool.workers["w-0"].live = False  # the first pick waits for its cache
    asking = asyncio.create_task(s.ask())
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    left = s.journal.find("r")
    assert isinstance(left, Refused)
    assert left.model == "m"
    assert left.outcome == {"status": 499, "dropped_reason": "rejected-context-cancelled"}


async def test_a_refusal_after_a_decision_is_in_its_entry() -> None:
    s = await scene()
    for worker in s.pool.workers.values():
        worker.load.draining = True
    assert isinstance(await s.ask(), Refusal)
    entry = s.journal.find("r")
    assert isinstance(entry, Entry)
    assert entry.outcome == {"status": 503, "dropped_reason": "rejected-no-endpoints"}


# --- spans


def traced() -> tuple[Tracing, InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider), exporter


async def test_a_pick_is_a_span_of_the_clients_trace_and_the_engine_goes_on_with_it() -> None:
    tracing, exporter = traced()
    s = await scene(tracing=tracing)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    route = await s.ask(headers=headers)
    assert isinstance(route, Route)
    *stages, pick = exporter.get_finished_spans()
    assert pick.context is not None
    assert pick.parent is not None
    assert f"{pick.context.trace_id:032x}" == TRACE
    assert f"{pick.parent.span_id:016x}" == PARENT
    onward = dict(route.set_headers)
    assert onward["traceparent"] == f"00-{TRACE}-{pick.context.span_id:016x}-01"
    assert onward["tracestate"] == "vendor=1"
    assert onward["x-dynamo-booking"] == "p-1;tokens=8;cached=4"
    assert [stage.name for stage in stages] == ["parse", "tokenize", "choose"]
    assert all(stage.parent == pick.context for stage in stages)
    assert pick.end_time == 1_000 * 10**9
    assert pick.attributes is not None
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.usage.input_tokens": 8,
        "server.address": "10.0.0.1",
        "server.port": 8000,
        "dynamo.routing.how": "exact",
        "dynamo.routing.worker": "w-1",
        "dynamo.routing.predicted_cached_tokens": 4,
    }.items() <= dict(pick.attributes).items()


async def test_refusals_are_spans_with_their_reason() -> None:
    tracing, exporter = traced()
    s = await scene(tracing=tracing)
    await s.ask("bad", b"{")
    for worker in s.pool.workers.values():
        worker.load.draining = True
    await s.ask("none")
    found = [span for span in exporter.get_finished_spans() if span.name == "pick"]
    assert [span.status.description for span in found] == ["bad-request", "rejected-no-endpoints"]


async def test_a_request_without_a_body_has_a_span_too() -> None:
    tracing, exporter = traced()
    s = await scene(tracing=tracing)
    asked = PickRequest(RequestHead("GET", "/v1/models", {"x-request-id": "r"}), None)
    assert isinstance(await s.picker.pick(asked), Route)
    pick = exporter.get_finished_spans()[-1]
    assert pick.attributes is not None
    assert pick.attributes["server.port"] == 8000
    assert "gen_ai.operation.name" not in pick.attributes


async def test_a_span_that_fails_does_not_cost_the_request_its_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracing, _ = traced()
    s = await scene(tracing=tracing)
    tracing.record = None  # type: ignore[assignment, method-assign]
    route = await s.ask()
    assert isinstance(route, Route)
    s.picker.released(route)
    assert not s.pool.workers["w-1"].load.booked
    assert "the span of request r was not recorded" in caplog.text


async def test_without_tracing_a_traceparent_is_left_alone() -> None:
    s = await scene()
    route = await s.ask(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert isinstance(route, Route)
    assert "traceparent" not in dict(route.set_headers)


# --- metrics


def test_labels_are_bounded_however_many_models_there_are() -> None:
    registry = CollectorRegistry()
    metrics = PickerMetrics(registry)
    for number in range(MAX_MODELS + 50):
        metrics.model(f"adapter-{number}").started.inc()
    metrics.model("adapter-0").started.inc()
    name = "dynamo_frontend_requests_started_total"
    assert registry.get_sample_value(name, {"model": OTHER}) == 50
    assert registry.get_sample_value(name, {"model": "adapter-0"}) == 2
    models = {
        sample.labels["model"]
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }
    assert len(models) == MAX_MODELS + 1


def test_a_path_that_is_no_api_of_ours_is_no_label() -> None:
    registry = CollectorRegistry()
    PickerMetrics(registry).model("m").ended("/any/thing", False, "success")
    labels = {"model": "m", "endpoint": OTHER, "request_type": "unary", "status": "success"}
    assert registry.get_sample_value("dynamo_frontend_requests_total", labels) == 1


async def test_pool_gauges_are_means_over_who_is_ready_and_tells() -> None:
    s = await scene()
    first, second = s.pool.workers.values()
    first.load.waiting, second.load.waiting = 3, 1
    first.load.kv_blocks_total, first.load.kv_blocks_used = 100, 25
    gauges = PoolMetrics(s.registry, "g")

    def value(name: str) -> float | None:
        return s.registry.get_sample_value(f"llm_d_epp_{name}", {"name": "g"})

    gauges.observe(s.pool.workers.values())
    assert value("ready_endpoints") == 2
    assert value("average_queue_size") == 2
    assert value("average_kv_cache_utilization") == 0.25
    await s.pool.apply(())
    gauges.observe(s.pool.workers.values())
    assert value("ready_endpoints") == value("average_queue_size") == 0
