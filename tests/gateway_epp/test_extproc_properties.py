"""What holds of every conversation, however it is cut and ordered."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from dynamo_epp.extproc import Exchange
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway_epp.fuzz_exchange import CASES, Message, answers, config, pattern


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_conversations(case: Callable[[random.Random], None], rng: random.Random) -> None:
    case(rng)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_more_conversations(case: Callable[[random.Random], None]) -> None:
    """Hypothesis prefers small ones; a plain generator does not."""
    for seed in range(200):
        case(random.Random(seed))


def test_a_large_body_in_small_pieces_is_held_once() -> None:
    """32 MiB, a kilobyte at a time: what is kept is the body, not a list of its pieces."""
    exchange, piece = Exchange(), pattern(1024)
    first = Message()
    config(first, duplex=True, response=True)
    first.request_headers.SetInParent()
    assert exchange.feed(first.SerializeToString()) == []
    chunk = Message()
    chunk.request_body.body = piece
    data = chunk.SerializeToString()
    for _ in range(32 * 1024):
        assert exchange.feed(data) == []
    assert len(exchange._body) == 32 << 20
    (refused,) = answers(exchange.feed(data))
    assert refused.immediate_response.status.code == 413
    assert (exchange.closed, len(exchange._body)) == (True, 0)
