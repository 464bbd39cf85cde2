"""Rate limits, whom to believe, and how long clients are told to wait."""

from __future__ import annotations

import pytest
from dynamo_epp.admission.demand import GivenUp
from dynamo_epp.admission.identity import DEFAULT_TENANT, priority_of, tenant_of
from dynamo_epp.admission.limits import Charge, RateLimiter
from dynamo_epp.admission.pace import LONGEST_S, UNKNOWN_S, Pace
from dynamo_epp.admission.settings import IdentitySettings, RateLimit, RateLimits
from hypothesis import given
from hypothesis import strategies as st

# --- rates

requests = st.lists(
    st.tuples(st.floats(0, 3), st.floats(1, 500), st.none() | st.floats(0, 800)), max_size=100
)


@given(requests, st.floats(0.5, 20), st.floats(10, 500), st.floats(0.5, 10), st.integers(1, 4))
def test_nobody_gets_more_than_rate_and_burst_and_one_request(
    script: list[tuple[float, float, float | None]],
    per_s: float,
    tokens_per_s: float,
    burst_s: float,
    pickers: int,
) -> None:
    limiter = RateLimiter(RateLimits(default=RateLimit(per_s, tokens_per_s, burst_s)))
    now, passed, used, largest = 0.0, 0, 0.0, 0.0
    for pause, tokens, really in script:
        now += pause
        charge = limiter.take("a", tokens, pickers, now)
        if isinstance(charge, float):
            assert charge > 0
            later = limiter.take("a", 0.0, pickers, now + charge + 1e-6)
            assert isinstance(later, Charge)  # it was told right
            limiter.refund(later)
            now += charge + 1e-6
            continue
        passed += 1
        if really is not None:
            limiter.settle(charge, really)
        used += tokens if really is None else really
        largest = max(largest, tokens, really or 0.0)
        assert passed <= 1 + max(1.0, per_s * burst_s / pickers) + per_s * now / pickers + 1e-6
        assert used <= largest + tokens_per_s * (burst_s + now) / pickers + largest + 1e-6


def test_a_limit_of_its_own_goes_before_the_default() -> None:
    limits = RateLimits(RateLimit(requests_per_s=1, burst_s=1), {"vip": RateLimit()})
    limiter = RateLimiter(limits)
    assert isinstance(limiter.take("a", 1, 1, 0.0), Charge)
    assert isinstance(limiter.take("a", 1, 1, 0.0), float)
    assert all(isinstance(limiter.take("vip", 1, 1, 0.0), Charge) for _ in range(100))
    assert not limiter.idle
    assert RateLimiter(RateLimits()).idle


# --- identity

NOBODY = IdentitySettings()
CLIENT = {
    "x-llm-d-inference-fairness-id": "me",
    "x-llm-d-inference-objective": "urgent",
    "x-tenant": "team",
    "x-priority": "-5",
    "authorization": "Bearer secret",
}


def objectives(name: str) -> int | None:
    return {"urgent": 100}.get(name)


@pytest.mark.parametrize(
    ("settings", "tenant", "priority"),
    [
        (NOBODY, DEFAULT_TENANT, 0),
        (IdentitySettings(tenant_header="X-Tenant", priority_header="X-Priority"), "team", -5),
        (IdentitySettings(api_key=True), "key-2bb80d537b1da3e3", 0),
        (IdentitySettings(tenant_header="x-tenant", api_key=True), "team", 0),
        (IdentitySettings(tenant_header="x-none", api_key=True), "key-2bb80d537b1da3e3", 0),
        (IdentitySettings(trust_client_headers=True), "me", 100),
    ],
)
def test_only_those_who_are_named_are_believed(
    settings: IdentitySettings, tenant: str, priority: int
) -> None:
    assert tenant_of(CLIENT, settings) == tenant
    assert priority_of(CLIENT, settings, objectives) == priority
    assert tenant_of({}, settings) == DEFAULT_TENANT
    assert priority_of({}, settings, objectives) == 0


@pytest.mark.parametrize("value", ["", "high", "1.5", "--1", "9" * 11, "²"])
def test_a_priority_that_is_no_whole_number_is_none(value: str) -> None:
    assert priority_of({"p": value}, IdentitySettings(priority_header="p")) == 0


# --- times


@given(st.floats(0.5, 50), st.integers(0, 500))
def test_who_comes_back_when_told_finds_the_queue_served(rate: float, ahead: int) -> None:
    pace, now = Pace(), 0.0
    while now < 60:
        pace.served(now)
        now += 1 / rate
    seconds = pace.retry_after(ahead, now)
    assert seconds >= 1
    right = (ahead + 1) / rate
    assert 0.7 * min(right, LONGEST_S) <= seconds <= 1.4 * right + 1.5


def test_a_pace_that_nobody_saw_is_a_guess() -> None:
    assert Pace().retry_after(3, 0.0) == UNKNOWN_S


def test_demand_lasts_as_long_as_it_is_told_and_ends_when_it_is_met() -> None:
    demand = GivenUp(lasts_s=100)
    demand.add(0.0)
    demand.add(50.0)
    assert [demand.count(now) for now in (50.0, 99.9, 100.0, 150.0)] == [2, 2, 1, 0]
    demand.add(200.0)
    demand.satisfied()
    assert demand.count(200.0) == 0
