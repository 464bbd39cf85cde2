"""Circuits: when they open, what closes them, and whom they can't keep away."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from dynamo_epp.endpoints.breaker import Breaker, BreakerSettings, State
from dynamo_epp.endpoints.circuits import Circuits, obeyed, told, verdicts
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.scheduling.filters.eligibility import reason_to_drop
from dynamo_epp.server import AccessEntry
from dynamo_kv_router.load import WorkerLoad
from dynamo_runtime.endpoint import Endpoint
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = BreakerSettings()
RNG = random.Random(0)


def fail(breaker: Breaker, now: float, times: int = 1, why: str = "503") -> list[str]:
    return [breaker.failure("request", why, now, SETTINGS, RNG) for _ in range(times)]


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    fail(breaker, now, 5)
    assert breaker.state(now) is State.OPEN
    return breaker


def worker(number: int, **fields: object) -> Worker:
    endpoint = Endpoint(f"w-{number}", f"10.0.0.{number + 1}", 8000, ready=True, stream_port=5557)
    result = Worker(
        replace(endpoint, **fields),  # type: ignore[arg-type]
        number,
        WorkerLoad(block_size=16, confirms=True),
        model="m",
    )
    result.models = frozenset(["m"])
    return result


def logged(**fields: object) -> AccessEntry:
    values: dict[str, object] = {
        "request_id": "r",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "flags": (),
        "details": "",
        "upstream": "10.0.0.1:8000",
        "attempts": 1,
        "first_byte_s": 0.1,
        "last_byte_s": 0.2,
        "request_bytes": 1,
        "response_bytes": 1,
        "routing": "",
    }
    return AccessEntry(**{**values, **fields})  # type: ignore[arg-type]


def test_failures_in_a_row_open_it_and_the_reason_says_so() -> None:
    breaker = Breaker()
    assert fail(breaker, 0.0, 5) == ["", "", "", "", "in-a-row"]
    assert breaker.blocks(1.0) == "circuit open: 5 failures in a row (503)"


def test_a_success_in_between_begins_the_row_anew() -> None:
    breaker, settings = Breaker(), replace(SETTINGS, failure_ratio=0.0)
    for _ in range(10):
        for _ in range(4):
            assert not breaker.failure("request", "503", 0.0, settings, RNG)
        breaker.success("request", 0.0, settings)
    assert breaker.state(0.0) is State.CLOSED


def test_so_does_a_share_of_failures_in_the_window() -> None:
    breaker = Breaker()
    causes = []
    for n in range(40):
        breaker.success("request", n * 0.5, SETTINGS)
        causes.append(breaker.failure("request", "500", n * 0.5, SETTINGS, RNG))
        if causes[-1]:
            break
    assert causes == [""] * 9 + ["ratio"]  # at 20 requests
    assert breaker.reason == "10 of 20 requests failed in 30 s (500)"
    sparse = Breaker()
    for n in range(100):  # never 20 in 30 s
        sparse.success("request", n * 5.0, SETTINGS)
        assert not sparse.failure("request", "500", n * 5.0, SETTINGS, RNG)


def test_a_probe_closes_it_or_opens_it_for_longer() -> None:
    breaker, now, lengths = opened(), 0.0, []
    for _ in range(10):
        began = now
        while breaker.state(now) is State.OPEN:
            now += 0.25
        lengths.append(now - began)
        assert breaker.state(now) is State.HALF_OPEN
        assert breaker.blocks(now) == ""
        breaker.picked(now, SETTINGS)
        assert "a probe is under way" in breaker.blocks(now)
        now += 1
        assert fail(breaker, now) == ["probe"]
    for length, shortest in zip(lengths, (5, 10, 20, 40, 80, 160, 300, 300, 300), strict=False):
        assert shortest <= length <= shortest * 1.2 + 0.25
    now += 400
    breaker.picked(now, SETTINGS)
    breaker.success("request", now, SETTINGS)
    assert breaker.state(now) is State.CLOSED
    assert breaker.blocks(now) == ""


def test_what_began_before_it_opened_tells_nothing() -> None:
    breaker = opened(now=10.0)
    assert breaker.state(20.0) is State.HALF_OPEN
    breaker.success("request", 20.0, SETTINGS, began=9.0)  # a long answer, from better days
    breaker.success("request", 20.0, SETTINGS, began=12.0)  # sent while too few others were left
    assert breaker.state(20.0) is State.HALF_OPEN
    breaker.success("request", 20.5, SETTINGS, began=20.1)
    assert breaker.state(20.5) is State.CLOSED
    for _ in range(9):
        assert not breaker.failure("request", "503", 21.0, SETTINGS, RNG, began=20.2)


def test_a_probe_whose_client_left_makes_way_for_another() -> None:
    breaker = opened()
    breaker.picked(7.0, SETTINGS)
    breaker.released(8.0)
    assert breaker.blocks(8.5)
    assert not breaker.blocks(9.1)
    breaker.picked(10.0, SETTINGS)
    assert breaker.blocks(10.0 + SETTINGS.probe_time - 1)
    assert not breaker.blocks(10.0 + SETTINGS.probe_time)


def test_scrapes_count_by_themselves_and_close_what_they_opened() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.failure("scrape", "timeout", 0.0, SETTINGS, RNG)
        breaker.success("stream", 0.0, SETTINGS)
    assert breaker.state(0.0) is State.OPEN
    breaker.success("scrape", 1.0, SETTINGS)
    assert breaker.state(1.0) is State.OPEN
    breaker.success("scrape", 7.0, SETTINGS)
    assert breaker.state(7.0) is State.CLOSED
    by_requests = opened()
    assert by_requests.failure("stream", "lost", 7.0, SETTINGS, RNG) == ""  # it tells no probe
    by_requests.success("scrape", 7.0, SETTINGS)
    assert by_requests.state(7.0) is State.HALF_OPEN


def test_a_silent_endpoint_gets_nothing_until_it_is_heard_of_and_no_probe() -> None:
    workers = [worker(n) for n in range(2)]
    openings: list[str] = []
    circuits = Circuits(SETTINGS, lambda: workers, RNG, openings.append)
    for now in (3.0, 4.0, 5.0):
        circuits.silent(workers[0], "nothing heard for 3 s, and no answer within 3 s", now)
    assert openings == ["silent"]
    reason = "circuit open: nothing heard for 3 s, and no answer within 3 s"
    circuits.apply(1e6)
    assert (workers[0].circuit, workers[1].circuit) == (reason, "")
    circuits.heard(workers[0], 1e6)
    assert workers[0].circuit == ""
    assert circuits.states(1e6) == {"closed": 2}


def test_a_circuit_that_failures_opened_stays_open_behind_a_silence() -> None:
    breaker = opened()
    breaker.silent("timeout", 1.0)
    assert breaker.blocks(100.0) == "circuit open: timeout"
    assert breaker.heard()
    assert breaker.blocks(1.0) == "circuit open: 5 failures in a row (503)"
    assert breaker.blocks(100.0) == ""  # half-open: it would be the probe


def test_when_nobody_is_heard_of_it_is_the_picker_that_hears_nothing() -> None:
    workers = [worker(n) for n in range(4)]
    circuits = Circuits(SETTINGS, lambda: workers, RNG)
    for each in workers:
        circuits.silent(each, "timeout", 1.0)
    assert [bool(w.circuit) for w in workers] == [True, True, False, False]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["fail", "succeed", "pick", "release"]),
            st.sampled_from(["request", "stream", "scrape"]),
            st.floats(0, 20),
        ),
        max_size=200,
    )
)
def test_a_half_open_circuit_has_one_probe_and_an_open_one_ends(
    script: list[tuple[str, str, float]],
) -> None:
    breaker, now, rng = Breaker(), 0.0, random.Random(1)
    probe_until = blocked_since = None
    for step, source, pause in script:
        now += pause
        if not breaker.blocks(now):
            blocked_since = None
        match step:
            case "fail":
                breaker.failure(source, "x", now, SETTINGS, rng)  # type: ignore[arg-type]
                probe_until = None
            case "succeed":
                breaker.success(source, now, SETTINGS)  # type: ignore[arg-type]
            case "release":
                breaker.released(now)
                probe_until = None
            case "pick":
                if breaker.blocks(now):
                    continue
                if breaker.state(now) is State.HALF_OPEN:
                    assert probe_until is None or now >= probe_until
                    probe_until = now + SETTINGS.probe_time
                breaker.picked(now, SETTINGS)
        if breaker.state(now) is State.CLOSED:
            assert not breaker.blocks(now)
            probe_until = None
        if breaker.blocks(now) and blocked_since is None:
            blocked_since = now
        if breaker.state(now) is State.OPEN:
            assert not breaker.blocks(now + 1.2 * SETTINGS.max_open_time)


# --- which are obeyed


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("de")), max_size=12),
    st.floats(0, 1),
)
def test_enough_endpoints_always_stay(pods: list[tuple[bool, bool, str]], share: float) -> None:
    settings = replace(SETTINGS, max_open_share=share)
    workers = []
    for n, (ready, broken, role) in enumerate(pods):
        each = worker(n, ready=ready, role=role)
        if broken:
            fail(each.breaker, float(n), 5)
        workers.append(each)
    kept_away = obeyed(workers, 0.0, settings)
    for role in "de":
        group = [w for w in workers if w.endpoint.ready and w.endpoint.role == role]
        away = [w for w in group if w in kept_away]
        broken_ones = [w for w in group if w.breaker.reason]
        limit = min(int(share * len(group)), max(0, len(group) - 1))
        assert len(away) == min(limit, len(broken_ones))
        assert away == broken_ones[: len(away)]  # the first to open
    assert all(not w.endpoint.ready or w.breaker.reason for w in kept_away)


def test_the_last_endpoint_is_never_kept_away_also_when_others_go() -> None:
    workers = [worker(n) for n in range(3)]
    opened_for: list[str] = []
    circuits = Circuits(SETTINGS, lambda: workers, RNG, opened_for.append)
    for _ in range(5):
        circuits.failed(workers[0], "request", "503", 0.0)
    assert opened_for == ["in-a-row"]
    assert reason_to_drop(workers[0], "m") == "circuit open: 5 failures in a row (503)"
    for each in workers[1:]:
        each.endpoint = replace(each.endpoint, ready=False)
    circuits.apply(1.0)
    assert reason_to_drop(workers[0], "m") == ""
    assert circuits.states(1.0) == {"disobeyed": 1, "closed": 2}
    assert told(workers[0], 1.0).endswith(
        "; it gets requests all the same, as too few others are left"
    )


def test_when_all_fail_it_is_not_the_endpoints() -> None:
    workers = [worker(n) for n in range(4)]
    circuits = Circuits(SETTINGS, lambda: workers, RNG)
    for _ in range(5):
        for each in workers:
            circuits.failed(each, "request", "503", 0.0)
    assert [bool(w.circuit) for w in workers] == [True, True, False, False]
    circuits.succeeded(workers[2], "request", 10.0)
    circuits.succeeded(workers[0], "request", 10.0)
    assert circuits.states(10.0) == {"closed": 2, "half-open": 2}


def test_a_share_of_all_leaves_one() -> None:
    workers = [worker(n) for n in range(3)]
    for each in workers:
        fail(each.breaker, 0.0, 5)
    assert list(obeyed(workers, 1.0, replace(SETTINGS, max_open_share=1.0))) == workers[:2]


def test_switched_off_nothing_opens() -> None:
    workers = [worker(n) for n in range(2)]
    circuits = Circuits(replace(SETTINGS, enabled=False), lambda: workers, RNG)
    for _ in range(50):
        circuits.failed(workers[0], "request", "503", 0.0)
    circuits.silent(workers[0], "timeout", 0.0)
    assert circuits.states(0.0) == {"closed": 2}


# --- what the access log tells

ORDER = ("10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, {ORDER[0]: ""}),
        ({"status": 404}, {ORDER[0]: ""}),
        ({"status": 503}, {ORDER[0]: "503"}),
        ({"status": 503, "flags": ("upstream_connection_failure",)}, {ORDER[0]: "connect failure"}),
        ({"flags": ("upstream_remote_reset",)}, {ORDER[0]: "reset"}),
        ({"status": 504, "flags": ("stream_idle_timeout",)}, {ORDER[0]: "silent"}),
        ({"flags": ("downstream_connection_termination",)}, {}),
        (
            {"upstream": ORDER[2], "attempts": 3},
            {ORDER[0]: "no answer", ORDER[1]: "no answer", ORDER[2]: ""},
        ),
        (
            {"upstream": ORDER[1], "attempts": 2, "flags": ("downstream_remote_reset",)},
            {ORDER[0]: "no answer"},
        ),
        ({"upstream": "", "status": 503}, {}),  # the picker's or the proxy's own answer
        (
            {"upstream": "", "attempts": 2, "flags": ("upstream_connection_failure",)},
            {ORDER[0]: "connect failure", ORDER[1]: "connect failure"},
        ),
        ({"upstream": "10.9.9.9:1", "attempts": 2}, {"10.9.9.9:1": ""}),
    ],
)
def test_whom_an_entry_of_the_access_log_blames(
    fields: dict[str, object], told: dict[str, str]
) -> None:
    assert verdicts(logged(**fields), ORDER) == told


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"consecutive_failures": 0}, "consecutive_failures and min_requests must be ≥ 1"),
        ({"max_open_share": 1.5}, "max_open_share is 1.5; it must be between 0 and 1"),
        ({"open_time": 0.0}, "open_time is 0.0; it must be a number > 0"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BreakerSettings(**fields)  # type: ignore[arg-type]
