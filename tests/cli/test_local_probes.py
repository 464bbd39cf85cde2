"""Probe semantics in virtual time: no clock, no server."""

import pytest
from dynamo_cli.local.probes import (
    ContainerProbes,
    Exec,
    Grpc,
    HttpGet,
    InvalidProbe,
    Kind,
    Probe,
    ProbeState,
    TcpSocket,
    parse_probe,
)

ACTION = TcpSocket(1)


def probe(kind: Kind, **times: float) -> Probe:
    return Probe(kind, ACTION, **times)  # type: ignore[arg-type]


def play(state: ProbeState, answers: str) -> list[tuple[float, bool | None]]:
    """Ask when due, answering from ``answers`` ("+-"); the results as (time, result)."""
    seen = []
    for answer in answers:
        now = state.next_due
        state.record(now, answer == "+")
        seen.append((now, state.result))
    return seen


def test_defaults_are_kubernetes() -> None:
    parsed = parse_probe(Kind.READINESS, {"httpGet": {"port": 80}}, {}, "readinessProbe")
    assert parsed == Probe(
        Kind.READINESS, HttpGet(80), initial_delay=0, period=10, timeout=1, success=1, failure=3
    )


def test_results_before_any_answer() -> None:
    assert ProbeState(probe(Kind.LIVENESS), 0).result is True
    assert ProbeState(probe(Kind.READINESS), 0).result is False
    assert ProbeState(probe(Kind.STARTUP), 0).result is None


def test_initial_delay_counts_from_the_start_of_the_container() -> None:
    assert ProbeState(probe(Kind.LIVENESS, initial_delay=7), 100).next_due == 107


def test_liveness_fails_after_that_many_failures_in_a_row_a_period_apart() -> None:
    state = ProbeState(probe(Kind.LIVENESS, period=10, failure=3), 0)
    assert play(state, "--+---") == [
        (0, True), (10, True), (20, True), (30, True), (40, True), (50, False),
    ]  # fmt: skip


def test_readiness_needs_successes_in_a_row_and_loses_it_after_failures_in_a_row() -> None:
    state = ProbeState(probe(Kind.READINESS, period=10, success=2, failure=2), 0)
    assert [result for _, result in play(state, "+-++-+--+")] == [
        False, False, False, True, True, True, True, False, False,
    ]  # fmt: skip


def test_readiness_is_asked_eagerly_while_not_ready_and_at_its_period_after() -> None:
    state = ProbeState(probe(Kind.READINESS, period=10), 0)
    assert [now for now, _ in play(state, "---++")] == [0, 1, 2, 3, 10]


def test_startup_gets_exactly_threshold_times_period_however_often_it_is_asked() -> None:
    state = ProbeState(probe(Kind.STARTUP, period=5, failure=3), 0)
    asked = play(state, "-" * 11)
    assert asked[-1] == (10, False)  # third tick: 0, 5, 10
    assert all(result is None for _, result in asked[:-1])


def test_an_eager_success_starts_the_container_between_two_ticks() -> None:
    state = ProbeState(probe(Kind.STARTUP, period=10, failure=30), 0)
    assert play(state, "---+")[-1] == (3, True)


def test_ticks_that_startup_held_back_are_not_made_up_for() -> None:
    state = ProbeState(probe(Kind.LIVENESS, period=10), 0)
    state.record(95, True)
    assert state.next_due == 105


def test_without_probes_a_running_container_is_started_and_ready() -> None:
    probes = ContainerProbes((), 0)
    assert probes.started
    assert probes.ready
    assert probes.failed is None


def test_startup_holds_readiness_and_liveness_back() -> None:
    probes = ContainerProbes(
        (probe(Kind.STARTUP), probe(Kind.READINESS), probe(Kind.LIVENESS, failure=1)), 0
    )
    startup, readiness = probes.get(Kind.STARTUP), probes.get(Kind.READINESS)
    liveness = probes.get(Kind.LIVENESS)
    assert startup is not None
    assert readiness is not None
    assert liveness is not None
    readiness.record(0, True)
    liveness.record(0, False)
    assert not probes.ready
    assert probes.failed is None
    assert probes.waiting_for is startup
    startup.record(1, True)
    assert probes.ready
    assert probes.failed is liveness


def test_actions_and_named_ports() -> None:
    ports = {"http": 8000}
    raw = {"httpGet": {"path": "live", "port": "http", "scheme": "HTTPS"}, "periodSeconds": 3}
    assert parse_probe(Kind.LIVENESS, raw, ports, "").action == HttpGet(
        8000, "/live", scheme="HTTPS"
    )
    assert parse_probe(Kind.LIVENESS, {"tcpSocket": {"port": "81"}}, ports, "").action == (
        TcpSocket(81)
    )
    assert parse_probe(Kind.LIVENESS, {"grpc": {"port": 9, "service": "s"}}, ports, "").action == (
        Grpc(9, "s")
    )
    assert parse_probe(Kind.LIVENESS, {"exec": {"command": ["a", 1]}}, ports, "").action == (
        Exec(("a", "1"))
    )


@pytest.mark.parametrize(
    ("kind", "raw", "says"),
    [
        (Kind.LIVENESS, {"httpGet": {"port": "web"}}, "neither a number nor a port .*http"),
        (Kind.LIVENESS, {"httpGet": {"port": 70000}}, "not between 1 and 65535"),
        (Kind.LIVENESS, {}, "one of httpGet, tcpSocket, grpc, exec"),
        (Kind.LIVENESS, {"tcpSocket": {"port": 1}, "successThreshold": 2}, "must be 1"),
        (Kind.READINESS, {"tcpSocket": {"port": 1}, "periodSeconds": -1}, "periodSeconds is -1"),
        (Kind.READINESS, {"exec": {"command": []}}, "exec.command is empty"),
    ],
)
def test_a_wrong_probe_is_named(kind: Kind, raw: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidProbe, match=says):
        parse_probe(kind, raw, {"http": 8000}, "probe")
