"""How full a pool is: on examples, and its short cut against its definition."""

from __future__ import annotations

import pytest
from dynamo_epp.admission.saturation import (
    Occupancy,
    endpoint_saturation,
    has_room,
    pool_saturation,
    queue_estimate,
)
from dynamo_epp.admission.settings import SaturationSettings
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = SaturationSettings(metrics_staleness_s=5)
BUSY = Occupancy(age_s=0.0, waiting=5, in_hand_then=20, in_hand=20)
IDLE = Occupancy(age_s=0.0)
STALE = Occupancy(age_s=6.0)
UNTOLD = Occupancy(age_s=None)

occupancies = st.builds(
    Occupancy,
    age_s=st.none() | st.floats(0, 10),
    waiting=st.integers(0, 10),
    kv_used=st.floats(0, 1),
    in_hand_then=st.integers(0, 20),
    in_hand=st.integers(0, 40),
)
settings = st.builds(
    SaturationSettings,
    queue_depth_threshold=st.sampled_from([0, 1, 5]),
    kv_cache_util_threshold=st.sampled_from([0, 0.5, 0.8]),
    max_concurrency=st.sampled_from([0, 10]),
)


@pytest.mark.parametrize(
    ("endpoint", "more", "queue"),
    [
        (IDLE, 0, 0),
        (IDLE, 7, 7),  # it ran nothing: what comes now may have to wait
        (Occupancy(0.0, waiting=0, in_hand_then=20, in_hand=30), 0, 0),  # as many again
        (Occupancy(0.0, waiting=0, in_hand_then=20, in_hand=45), 0, 5),
        (BUSY, 0, 5),
        (BUSY, 2, 7),  # it queues: so do they
        (Occupancy(0.0, waiting=5, in_hand_then=20, in_hand=17), 0, 2),  # three have ended
        (Occupancy(0.0, waiting=5, in_hand_then=20, in_hand=0), 0, 0),
    ],
)
def test_what_came_and_went_since_the_figures_is_counted(
    endpoint: Occupancy, more: float, queue: float
) -> None:
    assert queue_estimate(endpoint, more) == queue


@pytest.mark.parametrize(
    ("endpoints", "saturation"),
    [
        ([], 1.0),
        ([IDLE], 0.0),
        ([BUSY], 1.0),
        ([BUSY, IDLE], 0.5),
        ([Occupancy(0.0, waiting=500, in_hand_then=9, in_hand=9), IDLE], 0.5),  # counts for 1
        ([Occupancy(0.0, kv_used=0.4)], 0.5),
        ([STALE, IDLE], 0.5),
        ([STALE, BUSY], 1.0),
        ([STALE, STALE], 0.0),  # the picker is blind
        ([UNTOLD, UNTOLD], 0.0),
        ([UNTOLD, BUSY], 0.5),
    ],
)
def test_how_full_a_pool_is(endpoints: list[Occupancy], saturation: float) -> None:
    assert pool_saturation(endpoints, SETTINGS) == pytest.approx(saturation)


def test_an_endpoint_without_figures_is_judged_by_its_concurrency() -> None:
    limited = SaturationSettings(max_concurrency=10)
    assert endpoint_saturation(Occupancy(None, in_hand=5), limited) == 0.5
    assert pool_saturation([Occupancy(9.0, in_hand=5)], limited) == 0.5


@given(st.lists(occupancies, max_size=6), settings, st.floats(0, 3))
def test_a_pool_has_room_exactly_if_it_is_not_saturated(
    endpoints: list[Occupancy], setting: SaturationSettings, share: float
) -> None:
    saturation = pool_saturation(endpoints, setting, share * len(endpoints))
    assert 0 <= saturation <= 1
    assert has_room(iter(endpoints), setting, share) == (saturation < 1)
