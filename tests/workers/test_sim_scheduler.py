"""The block pool and the scheduler, against rules and against a simpler model of them."""

import pickle
import re
from dataclasses import dataclass, field, replace
from hashlib import sha256

import msgspec
import pytest
from dynamo_runtime.timing_profile import DecodePoint, TimingProfile
from dynamo_workers.sim.adapters import Adapter, parse
from dynamo_workers.sim.blocks import BlockPool, Cleared, Removed, Stored, block_hash, none_hash
from dynamo_workers.sim.events import encode, external_hash
from dynamo_workers.sim.scheduler import Limits, Scheduler, Sequence
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE = 4
PROFILE = TimingProfile(
    prefill_tokens_per_s=1000.0, prefill_overhead_s=0.5, decode=(DecodePoint(1, 2.0),)
)


def scheduler(
    blocks: int = 64,
    seqs: int = 8,
    batched: int = 1000,
    longest: int = 40,
    caching: bool = True,
    loras: int = 0,
) -> Scheduler:
    limits = Limits(
        block_size=SIZE,
        total_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        max_model_len=longest,
        prefix_caching=caching,
        max_loras=loras,
    )
    return Scheduler(limits, PROFILE, none_hash())


def run(engine: Scheduler, *sequences: Sequence) -> list[float]:
    """Runs until idle; returns the seconds of each step."""
    for sequence in sequences:
        engine.add(sequence, 0.0)
    now, seconds = 0.0, []
    while (step := engine.schedule(now)) is not None:
        now += step.seconds
        seconds.append(step.seconds)
        engine.complete(step, now)
    return seconds


def test_hashes_are_those_that_vllm_publishes():
    # Captured from vLLM 0.32: 96 tokens in blocks of 32, plain and with a cache salt.
    tokens = ([2] + [281, 283, 224] * 40)[:96]
    for salt, expected in (
        (None, [2558257725695544300, 4823663309940529604, 4119037696825486090]),
        ("tenant-a", [8505097353499620638, 3080974339419895961, 12006436911804200112]),
    ):
        parent, seen = none_hash(), []
        for index in range(3):
            own = salt if index == 0 else None
            parent = block_hash(parent, tokens[32 * index : 32 * index + 32], own)
            seen.append(external_hash(parent))
        assert seen == expected


def test_prompt_is_prefilled_then_decoded_one_token_a_step():
    engine = scheduler()
    sequence = Sequence(list(range(10)), [100, 101, 102])
    assert run(engine, sequence) == [pytest.approx(0.51), 2.0, 2.0]
    assert (sequence.produced, sequence.cached_tokens, sequence.finished) == (3, 0, True)
    assert sequence.first_token_at == pytest.approx(0.51)
    assert sequence.last_token_at == pytest.approx(4.51)


def test_only_full_blocks_with_computed_tokens_are_cached():
    engine = scheduler()
    run(engine, Sequence(list(range(10)), [100, 101, 102]))
    stored = [event for event in engine.pool.take_events() if isinstance(event, Stored)]
    # 12 of the 13 tokens were computed (the last one never is): two prompt blocks, then the block
    # that decoding filled, chained to them.
    assert [event.tokens for event in stored] == [tuple(range(8)), (8, 9, 100, 101)]
    assert stored[0].parent is None
    assert stored[1].parent == stored[0].hashes[-1]


def test_second_turn_finds_prompt_and_answer_of_the_first():
    engine = scheduler()
    first = Sequence(list(range(10)), [100, 101, 102])
    run(engine, first)
    second = Sequence([*first.prompt, *first.answer, 200, 201], [5])
    run(engine, second)
    assert second.cached_tokens == 12


def test_a_wholly_cached_prompt_still_computes_its_last_block():
    engine = scheduler()
    run(engine, Sequence(list(range(8)), [1]))
    again = Sequence(list(range(8)), [1])
    run(engine, again)
    assert again.cached_tokens == 4
    assert (engine.prefix_queries, engine.prefix_hits) == (16, 4)


def test_salts_separate_and_the_event_names_them_in_the_first_block():
    engine = scheduler()
    run(engine, Sequence(list(range(12)), [1], salt="a"))
    stored = engine.pool.take_events()
    assert [event.salts for event in stored if isinstance(event, Stored)] == [("a", None, None)]
    other, same = Sequence(list(range(12)), [1], salt="b"), Sequence(list(range(12)), [1], salt="a")
    run(engine, other)
    run(engine, same)
    assert (other.cached_tokens, same.cached_tokens) == (0, 8)


SQL, CHAT = Adapter("sql", "/a/sql", 1), Adapter("chat", "/a/chat", 2)


def test_what_an_adapter_computes_is_its_own():
    engine = scheduler(loras=1)
    run(engine, Sequence(list(range(12)), [1], adapter=SQL))
    (stored,) = [event for event in engine.pool.take_events() if isinstance(event, Stored)]
    parent = none_hash()
    for index, found in enumerate(stored.hashes):
        extra = (("lora", "sql", "/a/sql"),)  # as in vLLM 0.32: in each block, with its path
        tokens = tuple(range(SIZE * index, SIZE * index + SIZE))
        parent = sha256(pickle.dumps((parent, tokens, extra), protocol=5)).digest()
        assert found == parent
    shown = msgspec.msgpack.decode(encode([stored], SIZE, 0.0))[1][0]
    assert (shown["lora_id"], shown["lora_name"]) == (1, "sql")
    assert shown["extra_keys"] == [["sql"]] * len(stored.hashes)
    base, other, same = (Sequence(list(range(12)), [1], adapter=a) for a in (None, CHAT, SQL))
    for sequence in (base, other, same):
        run(engine, sequence)
    assert [each.cached_tokens for each in (base, other, same)] == [0, 0, 8]
    both = encode([replace(stored, salts=("s", None, None))], SIZE, 0.0)
    assert msgspec.msgpack.decode(both)[1][0]["extra_keys"] == [["sql", "s"], ["sql"], ["sql"]]


def test_who_waits_for_an_adapters_place_is_passed_over():
    engine = scheduler(loras=1)
    first, second, third = (Sequence([1, 2], [3, 4], adapter=a) for a in (SQL, CHAT, SQL))
    base = Sequence([1, 2], [3])
    for sequence in (first, second, third, base):
        engine.add(sequence, 0.0)
    step = engine.schedule(0.0)
    assert step is not None
    assert [sequence for sequence, _ in step.work] == [first, third, base]
    assert list(engine.waiting) == [second]
    engine.complete(step, 1.0)
    run(engine)
    assert second.finished


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sql"], "'sql': use NAME=PATH, or"),
        (['{"name": "sql"}'], "missing required field `path`"),
        (["sql=/a", '{"name": "sql", "path": "/b"}'], "an adapter of this name already"),
    ],
)
def test_mistakes_in_adapters_are_named(given: list[str], said: str):
    with pytest.raises(ValueError, match=f"^--lora-modules .*{re.escape(said)}"):
        parse(given)


def test_long_prompts_are_computed_in_chunks_beside_decoding():
    engine = scheduler(batched=8)
    decoding = Sequence([1, 2], [9] * 6)
    engine.add(decoding, 0.0)
    step = engine.schedule(0.0)
    assert step is not None
    engine.complete(step, 0.0)
    long = Sequence(list(range(100, 120)), [3])
    engine.add(long, 0.0)
    shares = []
    while not long.produced:
        step = engine.schedule(0.0)
        assert step is not None
        shares.append([count for _, count in step.work])
        engine.complete(step, 0.0)
    assert shares == [[1, 7], [1, 7], [1, 6]]


def test_no_more_sequences_than_the_batch_takes_and_first_come_first_served():
    engine = scheduler(seqs=2)
    sequences = [Sequence([n, n], [7, 7]) for n in range(4)]
    for sequence in sequences:
        engine.add(sequence, 0.0)
    step = engine.schedule(0.0)
    assert step is not None
    assert [sequence for sequence, _ in step.work] == sequences[:2]
    assert list(engine.waiting) == sequences[2:]


def test_the_youngest_gives_its_blocks_up_and_starts_again():
    engine = scheduler(blocks=11, longest=40)  # 10 usable blocks
    old, young = Sequence(list(range(16)), [1] * 12), Sequence(list(range(50, 66)), [2] * 12)
    run(engine, old, young)
    assert (old.preemptions, old.finished, old.produced) == (0, True, 12)
    assert young.preemptions > 0
    assert (young.finished, young.produced, young.cached_tokens) == (True, 12, 0)
    assert engine.preemptions == young.preemptions
    assert engine.pool.used_count == 0


def test_abort_frees_blocks_whether_waiting_running_or_within_a_step():
    engine = scheduler(seqs=1)
    running, waiting = Sequence(list(range(9)), [1] * 5), Sequence([1, 2, 3], [1])
    engine.add(running, 0.0)
    engine.add(waiting, 0.0)
    step = engine.schedule(0.0)
    assert step is not None
    engine.abort(waiting)
    engine.abort(running)
    assert (engine.pool.used_count, engine.idle) == (0, True)
    assert engine.complete(step, 1.0) == []
    assert (running.produced, running.aborted, waiting.aborted) == (0, True, True)


def test_prompts_without_answers_end_with_their_prefill():
    engine = scheduler()
    sequence = Sequence(list(range(9)), [])
    assert len(run(engine, sequence)) == 1
    assert (sequence.finished, sequence.produced) == (True, 0)


def test_without_prefix_caching_nothing_is_found_or_announced():
    engine = scheduler(caching=False)
    run(engine, Sequence(list(range(12)), [1]))
    again = Sequence(list(range(12)), [1])
    run(engine, again)
    assert again.cached_tokens == 0
    assert engine.pool.take_events() == []


def test_a_pool_too_small_for_one_sequence_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="needs 10 blocks of 4 tokens, but the pool has 10"):
        scheduler(blocks=10)


def test_reset_forgets_everything_unless_something_runs():
    engine = scheduler()
    run(engine, Sequence(list(range(12)), [1]))
    engine.pool.take_events()
    engine.add(Sequence([1], [1, 1]), 0.0)
    engine.schedule(0.0)
    assert engine.pool.reset() is False
    while (step := engine.schedule(0.0)) is not None:
        engine.complete(step, 0.0)
    assert engine.pool.reset() is True
    assert engine.pool.take_events()[-1] == Cleared()
    again = Sequence(list(range(12)), [1])
    run(engine, again)
    assert again.cached_tokens == 0


def test_tails_are_evicted_before_the_prefixes_they_stand_on():
    pool = BlockPool(4)
    blocks = pool.take(3)
    keys = [b"1", b"2", b"3"]
    pool.store(blocks, keys, None, range(12), None)
    pool.release(blocks)
    pool.take(2)
    assert pool.take_events()[1:] == [Removed(b"3"), Removed(b"2")]
    assert pool.find(keys) == blocks[:1]


# --- the pool against a plain model of it ---------------------------------------------------------


@dataclass
class PlainPool:
    """The same rules with lists: content by block, free blocks in the order of reuse."""

    free: list[int]
    content: dict[int, bytes] = field(default_factory=dict)
    users: dict[int, int] = field(default_factory=dict)

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            if not self.users[block]:
                at_end = block in self.content
                self.free = [*self.free, block] if at_end else [block, *self.free]

    def take(self, count: int) -> tuple[list[int], list[bytes]]:
        taken, self.free = self.free[:count], self.free[count:]
        for block in taken:
            self.users[block] = 1
        return taken, [self.content.pop(block) for block in taken if block in self.content]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pool_equals_a_plain_model(data: st.DataObject):
    total = data.draw(st.integers(2, 12), label="blocks")
    pool, plain = BlockPool(total), PlainPool(list(range(1, total)))
    held: list[list[int]] = []
    announced: dict[bytes, int] = {}
    for _ in range(data.draw(st.integers(1, 30), label="turns")):
        turn = data.draw(st.sampled_from(["take", "hit", "release"]))
        if turn == "take" and plain.free:
            count = data.draw(st.integers(1, len(plain.free)))
            taken, evicted = plain.take(count)
            assert pool.take(count) == taken
            assert [e.hash for e in pool.take_events() if isinstance(e, Removed)] == evicted
            for key in evicted:
                announced[key] -= 1
            full = data.draw(st.integers(0, count))
            keys = [bytes([data.draw(st.integers(0, 5))]) for _ in range(full)]
            pool.store(taken[:full], keys, None, range(full), None)
            pool.take_events()
            for block, key in zip(taken, keys, strict=False):
                plain.content[block] = key
                announced[key] = announced.get(key, 0) + 1
            held.append(taken)
        elif turn == "hit":
            key = bytes([data.draw(st.integers(0, 5))])
            found = pool.find([key])
            assert bool(found) == (key in plain.content.values())
            assert all(plain.content[block] == key for block in found)
            assert pool.free_among(found) == sum(block in plain.free for block in found)
            pool.hold(found)
            for block in found:
                plain.users[block] = plain.users.get(block, 0) + 1
                plain.free = [other for other in plain.free if other != block]
            if found:
                held.append(found)
        elif turn == "release" and held:
            blocks = held.pop(data.draw(st.integers(0, len(held) - 1)))
            plain.release(blocks)
            pool.release(blocks)
        assert pool.free_count == len(plain.free)
        assert pool.used_count == len({block for blocks in held for block in blocks})
        # What was announced and not taken back is exactly what can be found.
        for key, times in announced.items():
            assert times == list(plain.content.values()).count(key)
            assert bool(pool.find([key])) == (times > 0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_scheduler_keeps_its_promises_under_any_load(data: st.DataObject):
    """Nothing is lost or starved, limits hold in every step, and events describe the cache."""
    engine = scheduler(
        blocks=data.draw(st.integers(11, 24), label="blocks"),
        seqs=data.draw(st.integers(1, 4), label="seqs"),
        batched=data.draw(st.integers(1, 30), label="batched"),
    )
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=24)
    alive: list[Sequence] = []
    every: list[Sequence] = []
    cached: dict[bytes, int] = {}
    chains: dict[bytes, tuple[int, ...]] = {}  # hash -> all tokens up to its block

    def look() -> None:
        for event in engine.pool.take_events():
            if isinstance(event, Stored):
                before = () if event.parent is None else chains[event.parent]
                for number, key in enumerate(event.hashes):
                    before += event.tokens[number * SIZE : (number + 1) * SIZE]
                    assert chains.setdefault(key, before) == before
                    cached[key] = cached.get(key, 0) + 1
            elif isinstance(event, Removed):
                cached[event.hash] -= 1
        for key, times in cached.items():
            assert times >= 0
            assert bool(engine.pool.find([key])) == (times > 0)

    now = 0.0
    for _ in range(data.draw(st.integers(1, 40), label="turns")):
        if data.draw(st.booleans()):
            sequence = Sequence(data.draw(tokens), data.draw(tokens)[:10])
            engine.add(sequence, now)
            alive.append(sequence)
            every.append(sequence)
        if alive and data.draw(st.integers(0, 9)) == 0:
            engine.abort(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
        step = engine.schedule(now)
        if step is None:
            assert engine.idle
            continue
        assert sum(count for _, count in step.work) <= engine.limits.max_num_batched_tokens
        assert len(engine.running) <= engine.limits.max_num_seqs
        now += step.seconds
        engine.complete(step, now)
        look()
        holders = {block for sequence in engine.running for block in sequence.blocks}
        assert engine.pool.used_count == len(holders)
        alive = [sequence for sequence in alive if not sequence.finished]
    for _ in range(5000):
        step = engine.schedule(now)
        if step is None:
            break
        engine.complete(step, now)
        look()
    assert engine.idle
    assert engine.pool.used_count == 0
    for sequence in every:
        assert sequence.finished
        assert sequence.aborted or sequence.produced == len(sequence.answer)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_hits_are_exactly_the_longest_cached_prefix(data: st.DataObject):
    """One request at a time in a pool that never evicts: hits follow from the texts seen alone."""
    engine = scheduler(blocks=2000)
    seen: set[tuple[int, ...]] = set()
    for _ in range(data.draw(st.integers(1, 12))):
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=30))
        answer = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8))
        sequence = Sequence(prompt, answer)
        run(engine, sequence)
        expected = 0
        while (
            expected + SIZE < len(prompt)  # the last token is computed in any case
            and tuple(prompt[: expected + SIZE]) in seen
        ):
            expected += SIZE
        assert sequence.cached_tokens == expected
        computed = [*prompt, *answer[:-1]]
        for end in range(SIZE, len(computed) + 1, SIZE):
            seen.add(tuple(computed[:end]))
