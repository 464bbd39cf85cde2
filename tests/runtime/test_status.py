"""The status server over real sockets."""

import json
import logging

import aiohttp
import pytest
from dynamo_runtime import logs
from dynamo_runtime.lifecycle import Lifecycle
from dynamo_runtime.status import AddressInUse, StatusServer
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families as text_to_families


async def test_probes_and_metrics() -> None:
    lifecycle, registry = Lifecycle(), CollectorRegistry()
    Counter("dynamo_test", "A count.", registry=registry).inc()
    server = StatusServer(lifecycle, registry, "127.0.0.1", 0)
    await server.start()
    base = f"http://127.0.0.1:{server.port}"
    try:
        async with aiohttp.ClientSession() as session:

            async def get(path: str) -> tuple[int, str]:
                async with session.get(base + path) as answer:
                    return answer.status, await answer.text()

            lifecycle.set_not_ready("waiting for workers")
            status, body = await get("/ready")
            assert status == 503
            assert json.loads(body) == {
                "ready": False,
                "phase": "starting",
                "reason": "waiting for workers",
            }
            assert (await get("/live"))[0] == 200
            lifecycle.set_ready()
            assert (await get("/ready"))[0] == (await get("/health"))[0] == 200
            lifecycle.request_stop("SIGTERM")
            assert (await get("/ready"))[0] == 503
            assert (await get("/live"))[0] == 200
            assert "dynamo_test_total 1.0" in (await get("/metrics"))[1]
        with pytest.raises(AddressInUse, match=rf"can't listen on 127.0.0.1:{server.port}: "):
            await StatusServer(Lifecycle(), registry, "127.0.0.1", server.port).start()
    finally:
        await server.stop()


async def test_another_processs_metrics_are_passed_on() -> None:
    registry = CollectorRegistry()
    Counter("dynamo_test", "A count.", registry=registry).inc()
    server = StatusServer(Lifecycle(), registry, "127.0.0.1", 0)
    server.foreign_metrics = lambda: "# TYPE vllm:x gauge\nvllm:x 3.0\n"
    await server.start()
    try:
        url = f"http://127.0.0.1:{server.port}/metrics"
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        async with aiohttp.ClientSession() as session, session.get(url, headers=accept) as answer:
            page = await answer.text()
            assert answer.headers["Content-Type"].startswith("text/plain")
        found = {sample.name: sample.value for f in text_to_families(page) for sample in f.samples}
        assert found["dynamo_test_total"] == 1.0
        assert found["vllm:x"] == 3.0
    finally:
        await server.stop()


def test_json_lines_carry_the_request_id() -> None:
    record = logging.LogRecord("a.b", logging.INFO, "f", 1, "hello %s", ("you",), None)
    token = logs.request_id.set("req-1")
    try:
        line = json.loads(logs.JsonFormatter("epp").format(record))
    finally:
        logs.request_id.reset(token)
    assert line["message"] == "hello you"
    assert (line["component"], line["request_id"]) == ("epp", "req-1")
    assert line["ts"].endswith("Z")
    assert "request_id" not in json.loads(logs.JsonFormatter("epp").format(record))


def test_a_lines_own_figures_stay_apart_from_its_words() -> None:
    record = logging.LogRecord("access", logging.INFO, "f", 1, "/v1 200", (), None)
    record.fields = {"request_id": "r", "model": 'a"\n', "ttft_s": 0.5}
    line = json.loads(logs.JsonFormatter("epp").format(record))
    assert (line["message"], line["logger"], line["ttft_s"]) == ("/v1 200", "access", 0.5)
    assert (line["request_id"], line["model"]) == ("r", 'a"\n')
    assert (
        logs.HumanFormatter("epp")
        .format(record)
        .endswith(r'/v1 200 request_id="r" model="a\"\n" ttft_s=0.5')
    )


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="log level 'LOUD' is unknown; use one of DEBUG"):
        logs.configure("test", "LOUD")
