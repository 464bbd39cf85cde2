"""Three pickers against one: the spread of requests and of blocks, and prefixes that are hit."""

import pytest

from tests.gateway_epp.simulated_replicas import Seen, Simulation

SEEDS = (1, 2, 3, 4, 5, 6)


def seen(pickers: int, confirms: bool, **settings: object) -> Seen:
    return Simulation(pickers, confirms, **settings).seen(*SEEDS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one() -> Seen:
    """What one picker alone achieves, with workers that confirm."""
    return seen(1, True)


@pytest.fixture(scope="module")
def stock() -> Seen:
    return seen(3, False)


def test_three_pickers_spread_confirmed_load_as_evenly_as_one(one: Seen) -> None:
    three = seen(3, True)
    assert three.requests <= 1.05 * one.requests
    assert three.blocks <= 1.05 * one.blocks


def test_three_pickers_spread_the_load_of_stock_engines_nearly_as_evenly(
    one: Seen, stock: Seen
) -> None:
    assert stock.requests <= 1.05 * one.requests
    assert stock.blocks <= 1.15 * one.blocks


def test_pickers_that_believe_stale_figures_herd(one: Seen, stock: Seen) -> None:
    """Dynamo's issue #589: each takes the cheapest by figures that all of them read at once."""
    herding = seen(3, False, believes_all=True)
    assert herding.requests > 1.05 * stock.requests
    assert herding.blocks > 1.2 * one.blocks


def test_the_spread_costs_no_hits() -> None:
    alone = Simulation(1, False, prefixes=96, rate=120.0).seen(1, 2)
    three = Simulation(3, False, prefixes=96, rate=120.0).seen(1, 2)
    assert three.hits >= alone.hits
