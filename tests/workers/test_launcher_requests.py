"""The book of requests in the engine, against a plain model of what the engine's server reports."""

from __future__ import annotations

from typing import Any

import pytest
from dynamo_kv_router.stream.format import Accepted, Finished, FirstToken
from dynamo_workers.in_flight import LOST, Flights
from hypothesis import given
from hypothesis import strategies as st

PID = 7


def accept(name: str, tokens: int = 100, cached: int = 32) -> list[Any]:
    return ["a", PID, name, tokens, cached]


def test_load_follows_a_request_from_arrival_to_end() -> None:
    flights = Flights()
    assert flights.apply(accept("r-1")) == [Accepted("r-1", 100, 32)]
    assert (len(flights), flights.prefill_tokens, flights.blocks(32)) == (1, 68, 4)
    assert flights.apply(["f", PID, "r-1"]) == [FirstToken("r-1")]
    assert (flights.prefill_tokens, flights.blocks(32)) == (0, 4)
    assert flights.apply(["t", PID, 0, {"r-1": 40}]) == []
    assert flights.blocks(32) == 5
    assert flights.apply(["d", PID, "r-1", 101, 64, 41, 200]) == [Finished("r-1", 101, 64, 41, 200)]
    assert (len(flights), flights.prefill_tokens, flights.blocks(32)) == (0, 0, 0)
    assert flights.finished == 1


def test_a_first_token_is_told_once_and_only_of_known_requests() -> None:
    flights = Flights()
    flights.apply(accept("r-1"))
    assert flights.apply(["f", PID, "r-1"]) == [FirstToken("r-1")]
    assert flights.apply(["f", PID, "r-1"]) == []
    assert flights.apply(["f", PID, "r-2"]) == []
    assert flights.apply(["d", PID, "r-2", 1, 1, 1, 200]) == []


def test_prefill_workers_that_were_asked_in_vain_are_told_once() -> None:
    flights, failed = Flights(), ("10.0.0.1:8000", "10.0.0.2:8000")
    flights.apply(accept("r-1"))
    assert flights.apply(["p", PID, "r-1", "local", [*failed]]) == []
    flights.apply(accept("r-1", cached=0))  # it computes the prompt itself, then
    assert flights.apply(["f", PID, "r-1"]) == [FirstToken("r-1", failed)]
    assert flights.apply(["d", PID, "r-1", 1, 0, 1, 200]) == [Finished("r-1", 1, 0, 1, 200)]
    flights.apply(accept("r-2"))
    flights.apply(["p", PID, "r-2", "refused", [failed[0]]])
    assert flights.apply(["d", PID, "r-2", -1, -1, -1, 503]) == [
        Finished("r-2", status=503, prefillers_failed=failed[:1])
    ]
    assert flights.remote_prefills == {"local": 1, "refused": 1}
    assert flights.prefiller_failures == 3


def test_progress_of_one_process_says_nothing_about_another() -> None:
    flights = Flights()
    flights.apply(accept("r-1"))
    flights.apply(["a", PID + 1, "r-2", 10, 0])
    assert flights.apply(["t", PID, 3, {}]) == [Finished("r-1", -1, -1, -1, LOST)]
    assert list(flights.bookings()) == ["r-2"]
    flights.apply(["t", PID + 1, 2, {"r-2": 0}])
    assert flights.dropped_reports == 5


def test_unstreamed_requests_leave_prefill_when_the_engine_counts_their_first_token() -> None:
    flights = Flights()
    for name in ("r-1", "r-2", "r-3"):
        flights.apply(accept(name))
    flights.apply(["f", PID, "r-2"])  # a stream: seen by us, and counted by the engine too
    assert flights.engine_counted(1) == []
    assert flights.engine_counted(2) == [FirstToken("r-1")]
    assert flights.prefill_tokens == 68
    # Finished within one look: counted by the engine, and no longer ours to mark.
    flights.apply(accept("r-4"))
    flights.apply(["d", PID, "r-4", 1, 0, 1, 200])
    assert flights.engine_counted(3) == []
    # Seen by us before the engine's own count says so: not counted twice.
    flights.apply(["f", PID, "r-3"])
    flights.apply(accept("r-5"))
    assert flights.engine_counted(3) == []
    assert flights.engine_counted(4) == []
    assert flights.engine_counted(5) == [FirstToken("r-5")]


@pytest.mark.parametrize(
    "report", [[], ["?", 1], ["a", 1, 2, 3, 4], ["t", 1, 0], ["d", 1, "r-1"], ["a"]]
)
def test_a_report_of_another_form_is_refused(report: list[Any]) -> None:
    with pytest.raises(ValueError, match="unknown report"):
        Flights().apply(report)


NAMES = [f"r-{number}" for number in range(4)]
STEPS = st.lists(
    st.tuples(st.sampled_from("afdt"), st.sampled_from(NAMES), st.booleans()), max_size=40
)


@given(STEPS)
def test_lost_reports_heal_at_the_next_progress(steps: list[tuple[str, str, bool]]) -> None:
    """Whatever reports are lost, after a progress report the book equals the server's own."""
    flights = Flights()
    running: dict[str, int] = {}  # what the server has, name -> chunks
    told: set[str] = set()  # what the events add up to
    for kind, name, lost in steps:
        report: list[Any]
        if kind == "a" and name not in running:
            running[name] = 0
            report = accept(name)
        elif kind == "f" and name in running:
            running[name] += 1
            report = ["f", PID, name]
        elif kind == "d" and name in running:
            del running[name]
            report = ["d", PID, name, 1, 0, 1, 200]
        elif kind == "t":
            report = ["t", PID, 0, dict(running)]
        else:
            continue
        if lost:
            continue
        for event in flights.apply(report):
            if isinstance(event, Accepted):
                told.add(event.booking)
            elif isinstance(event, Finished):
                told.remove(event.booking)
        assert told == set(flights.bookings())
        if kind == "t":
            assert {name: flight.chunks for name, flight in flights.bookings().items()} == running
