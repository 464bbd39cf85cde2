"""What a gateway tells of an answer, and what the picker makes of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from dynamo_epp.endpoints.breaker import BreakerSettings
from dynamo_epp.endpoints.circuits import Circuits
from dynamo_epp.extproc import Route
from dynamo_epp.models import rules_from
from dynamo_epp.picker.bookings import LATE_S
from dynamo_kv_router.stream.format import Finished

from tests.gateway_epp.scene import Scene, scene

FIRST, SECOND = "10.0.0.1:8000", "10.0.0.0:8000"


async def picked(s: Scene, **options: Any) -> Route:
    route = await s.ask(**options)
    assert isinstance(route, Route)
    return route


def loads(s: Scene) -> dict[str, float]:
    return {name: worker.load.active_requests() for name, worker in s.pool.workers.items()}


@pytest.mark.parametrize("stream_port", [None, 5557], ids=["stock", "ours"])
async def test_load_is_where_the_answer_comes_from(stream_port: int | None) -> None:
    s = await scene(stream_port=stream_port, relays=True)
    route = await picked(s)
    assert route.endpoints == (FIRST, SECOND)
    assert loads(s) == {"w-0": 0, "w-1": 1}
    route.status, route.served = 200, SECOND
    s.picker.answered(route)
    # One of ours has counted the request by itself.
    assert loads(s) == {"w-0": 1 if stream_port is None else 0, "w-1": 0}
    route.complete = True
    s.picker.released(route)
    assert loads(s) == {"w-0": 0, "w-1": 0}
    entry = s.journal.get("r")
    assert entry is not None
    assert (entry.outcome["served_by"], entry.outcome["upstream"]) == ("w-0", SECOND)
    missed = {"reason": "retried"}
    assert s.registry.get_sample_value("dynamo_epp_picks_not_followed_total", missed) == 1


@pytest.mark.parametrize("served", ["", FIRST, "10.9.9.9:80"])
async def test_an_answer_from_the_pick_or_from_nobody_known_changes_nothing(served: str) -> None:
    s = await scene(stream_port=None, relays=True)
    route = await picked(s)
    route.status, route.served = 200, served
    s.picker.answered(route)
    assert loads(s) == {"w-0": 0, "w-1": 1}
    s.picker.released(route)
    assert loads(s) == {"w-0": 0, "w-1": 0}


async def test_an_endpoint_that_the_gateway_gave_up_counts_as_failed() -> None:
    workers: list[Any] = []
    settings = BreakerSettings(consecutive_failures=1)
    circuits = Circuits(settings, lambda: workers, random.Random(0))
    s = await scene(stream_port=None, relays=True, circuits=circuits)
    workers.extend(s.pool.workers.values())
    route = await picked(s)
    route.status, route.served = 200, SECOND
    s.picker.answered(route)
    reason = s.pool.workers["w-1"].circuit
    assert "the gateway went on to the next endpoint" in reason
    assert s.pool.workers["w-0"].circuit == ""
    assert (await picked(s, request_id="again")).endpoints == (SECOND,)


@pytest.mark.parametrize(
    ("status", "complete", "result"),
    [
        (200, True, "success"),
        (200, False, "cancelled"),
        (500, False, "error"),
        (0, False, "cancelled"),
    ],
)
async def test_how_a_relayed_answer_counts(status: int, complete: bool, result: str) -> None:
    s = await scene(relays=True)
    route = await picked(s)
    route.status, route.complete = status, complete
    s.picker.released(route)
    labels = {
        "model": "m",
        "endpoint": "chat_completions",
        "request_type": "unary",
        "status": result,
    }
    assert s.registry.get_sample_value("dynamo_frontend_requests_total", labels) == 1


def ended(s: Scene) -> dict[str, float]:
    """Requests that ended, by how."""
    return {
        sample.labels["status"]: sample.value
        for family in s.registry.collect()
        for sample in family.samples
        if sample.name == "dynamo_frontend_requests_total"
    }


@pytest.mark.parametrize("first", ["stream", "worker"])
@pytest.mark.parametrize(
    ("status", "result"),
    [(200, "success"), (404, "error"), (503, "error"), (499, "cancelled")],
)
async def test_an_answer_that_is_not_shown_is_told_of_by_its_worker(
    first: str, status: int, result: str
) -> None:
    workers: list[Any] = []
    settings = BreakerSettings(consecutive_failures=1)
    circuits = Circuits(settings, lambda: workers, random.Random(0))
    s = await scene(relays=True, circuits=circuits)
    workers.extend(s.pool.workers.values())
    route = await picked(s)
    route.unseen = True
    worker, end = s.pool.workers["w-1"], Finished("p-1", 8, 4, 3, status)
    if first == "worker":
        s.picker.on_finished(worker, end)
    assert ended(s) == {}
    s.picker.released(route)
    if first == "stream":
        assert ended(s) == {}
        s.picker.on_finished(worker, end)
    assert ended(s) == {result: 1}
    entry = s.journal.get("r")
    assert entry is not None
    assert entry.outcome["status"] == status
    assert (worker.circuit != "") == (status == 503)


@pytest.mark.parametrize("stream_port", [None, 5557], ids=["stock", "ours, silent"])
async def test_an_answer_that_nobody_tells_of_is_not_guessed(stream_port: int | None) -> None:
    s = await scene(relays=True, stream_port=stream_port)
    route = await picked(s)
    route.unseen = True
    s.picker.released(route)
    s.now[0] = LATE_S
    if stream_port is not None:
        assert ended(s) == {}
        other = await picked(s, request_id="other")
        other.status, other.complete = 200, True
        s.picker.released(other)
        assert ended(s) == {"unavailable": 1, "success": 1}
    else:
        assert ended(s) == {"unavailable": 1}
    entry = s.journal.get("r")
    assert entry is not None
    assert "status" not in entry.outcome


async def test_a_rewritten_model_is_the_one_that_is_looked_for() -> None:
    s = await scene()
    rule = {"matches": [{"model": {"value": "nice"}}], "targets": [{"modelRewrite": "m"}]}
    rewrite = {"metadata": {"name": "r"}, "spec": {"poolRef": {"name": "p"}, "rules": [rule]}}
    s.picker.rules = rules_from([], [rewrite], "p")
    body = b'{"model":"nice","messages":[],"kv_transfer_params":{"a":1},"top_p":0.50}'
    route = await picked(s, body=body)
    assert route.body == b'{"model":"m","messages":[],"top_p":0.50}'
    assert route.restore_model == ("m", "nice")
    plain = await picked(s, request_id="plain")
    assert (plain.body, plain.restore_model) == (None, None)
