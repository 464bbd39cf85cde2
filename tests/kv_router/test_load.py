"""The load view against a model that recounts everything."""

from collections.abc import Callable

import pytest
from dynamo_kv_router.engine_metrics import EngineFigures
from dynamo_kv_router.load import STOCK_PREFILL_TOKENS_PER_S, WorkerLoad, pickers_seen
from hypothesis import given
from hypothesis import strategies as st


def test_a_booking_counts_until_the_worker_confirms_and_ends() -> None:
    load = WorkerLoad(block_size=16, confirms=True)
    load.book("p-1", prompt_tokens=100, cached_tokens=32, now=1.0)
    assert load.active_prefill_tokens(1.0) == 68
    assert load.active_decode_blocks() == 7
    assert load.active_requests() == 1
    assert load.accept("p-1", 100, 48, now=1.25) == 0.25  # the blind window
    assert load.active_prefill_tokens(1.25) == 52
    load.first_token("p-1")
    assert load.active_prefill_tokens(2.0) == 0
    assert load.active_decode_blocks() == 7
    load.finish("p-1")
    assert (load.active_requests(), load.active_decode_blocks()) == (0, 0)


def test_unconfirmed_bookings_are_scaled_by_the_pickers() -> None:
    load = WorkerLoad(block_size=16, confirms=True, pickers=3)
    load.book("p-1", 160, 0, now=0.0)
    assert (load.active_requests(), load.active_decode_blocks()) == (3, 30)
    load.accept("p-1", 160, 0, now=0.1)
    assert (load.active_requests(), load.active_decode_blocks()) == (1, 10)


def test_a_client_that_leaves_frees_the_booking_but_not_what_the_worker_runs() -> None:
    load = WorkerLoad(block_size=16, confirms=True)
    load.book("p-1", 16, 0, now=0.0)
    load.book("p-2", 16, 0, now=0.0)
    load.accept("p-2", 16, 0, now=0.1)
    load.release("p-1")
    load.release("p-2")
    assert load.active_requests() == 1


def test_an_acceptance_without_token_counts_keeps_what_was_booked() -> None:
    load = WorkerLoad(block_size=16, confirms=True)
    load.book("p-1", 64, 16, now=0.0)
    load.accept("p-1", -1, -1, now=0.1)
    assert load.active_prefill_tokens(0.1) == 48


def test_prefill_on_stock_engines_fades() -> None:
    load = WorkerLoad(block_size=16, confirms=False)
    load.book("p-1", int(STOCK_PREFILL_TOKENS_PER_S), 0, now=10.0)
    assert load.active_prefill_tokens(10.5) == STOCK_PREFILL_TOKENS_PER_S / 2
    assert load.active_prefill_tokens(12.0) == 0
    assert load.active_requests() == 1
    load.release("p-1")
    assert load.active_requests() == 0


def test_others_on_stock_engines_are_what_its_figures_count_beyond_ours() -> None:
    load = WorkerLoad(block_size=16, confirms=False)
    load.book("p-1", 160, 0, now=0.0)
    load.observe(EngineFigures(3, 1, 0.5, 0.0), 50, 100, 1.0)
    assert (load.active_requests(), load.active_decode_blocks()) == (4, 50)
    load.book("p-2", 160, 0, now=1.1)
    assert (load.active_requests(), load.active_decode_blocks()) == (5, 60)
    load.forget_figures()
    assert (load.active_requests(), load.active_decode_blocks()) == (2, 20)


def test_pickers_are_told_by_the_share_of_the_requests_that_are_ours() -> None:
    loads = [WorkerLoad(block_size=16, confirms=False) for _ in range(4)]
    assert pickers_seen(loads) == 1
    for number, load in enumerate(loads):
        for request in range(5):
            load.book(f"p-{request}", 160, 0, now=0.0)
        load.observe(EngineFigures(5, 0, 0.5, 0.0), 50, 100, 1.0)
        assert pickers_seen(loads) == 1, number
    for load in loads:
        load.observe(EngineFigures(12, 3, 0.5, 0.0), 50, 100, 2.0)
    assert pickers_seen(loads) == pytest.approx(3, abs=0.1)


def test_workers_that_confirm_say_nothing_of_unseen_pickers() -> None:
    ours = WorkerLoad(block_size=16, confirms=True)
    ours.observe(EngineFigures(9, 0, 0.5, 0.0), 50, 100, 1.0)
    assert pickers_seen([ours]) == 1


keys = st.sampled_from(["a", "b", "c"])
tokens = st.integers(-1, 200)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("book"), keys, st.integers(0, 200), st.integers(0, 250)),
        st.tuples(st.just("accept"), keys, tokens, tokens),
        st.tuples(st.just("first"), keys),
        st.tuples(st.just("finish"), keys),
        st.tuples(st.just("release"), keys),
        st.tuples(
            st.just("reset"),
        ),
    )
)


@given(steps)
def test_the_sums_never_drift(sequence: list[tuple[object, ...]]) -> None:
    load = WorkerLoad(block_size=16, confirms=True)
    calls: dict[str, Callable[..., object]] = {
        "book": lambda key, prompt, cached: load.book(key, prompt, cached, 0.0),
        "accept": lambda key, prompt, cached: load.accept(key, prompt, cached, 0.0),
        "first": load.first_token,
        "finish": load.finish,
        "release": load.release,
        "reset": load.reset_accepted,
    }
    for name, *arguments in sequence:
        calls[str(name)](*arguments)
        for requests, prefill, decode in (
            (load.accepted, load.accepted_prefill_tokens, load.accepted_decode_blocks),
            (load.booked, load.booked_prefill_tokens, load.booked_decode_blocks),
        ):
            assert prefill == sum(r.prefill_tokens for r in requests.values()) >= 0
            assert decode == sum(r.decode_blocks for r in requests.values()) >= 0
