"""Raw events in both encodings, and the normaliser against a model of an engine's cache."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from dynamo_kv_router.engine_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Caught,
    EngineBatch,
    Gap,
    Missed,
    Restarted,
    Undecodable,
    decode_batch,
)
from dynamo_kv_router.extras import block_extras
from dynamo_kv_router.keys import block_keys, model_seed
from dynamo_kv_router.normaliser import Changes, Normaliser
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

BLOCK = 4
FIELDS = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
    "lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind", "from_the_future",
)  # fmt: skip


def seed_for(lora: str) -> int:
    return model_seed("tiny", lora)


def stored(tokens, hashes, parent=None, **fields) -> dict:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": BLOCK,
        "medium": "GPU",
        **fields,
    }


def removed(*hashes, **fields) -> dict:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", **fields}


CLEARED = {"type": "AllBlocksCleared"}


def positional(event: dict) -> list:
    """The older encoding of an event."""
    names = {"BlockStored": FIELDS, "BlockRemoved": ("block_hashes", "medium", "group_idx")}
    fields = [event.get(name) for name in names.get(event["type"], ())]
    while fields and fields[-1] is None:
        fields.pop()
    return [event["type"], *fields]


def batch(*events, rank: int | None = 0, old: bool = False) -> EngineBatch:
    wire = [positional(event) if old else event for event in events]
    payload = [1.5, wire] if rank is None else [1.5, wire, rank]
    return decode_batch(msgspec.msgpack.encode(payload), 7)


def keys_of(tokens, lora="", extras=()) -> list[int]:
    return block_keys(tokens, BLOCK, seed=seed_for(lora), extras=extras).tolist()


class Picker:
    """Applies changes and insists that each is one."""

    def __init__(self) -> None:
        self.cached: set[int] = set()

    def apply(self, changes: Changes) -> None:
        if changes.cleared:
            self.cached.clear()
        assert not set(changes.removed) - self.cached
        self.cached -= set(changes.removed)
        assert not set(changes.stored) & self.cached
        self.cached |= set(changes.stored)


# --- decoding


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("hashes", [[1, 2**64 - 1], [b"a" * 32, b"b" * 32]])
def test_both_encodings(old, hashes):
    tokens = list(range(2 * BLOCK))
    got = batch(
        stored(tokens, hashes, parent=hashes[0], lora_name="lo", extra_keys=[["lo", "s"], None]),
        removed(*hashes, group_idx=0),
        CLEARED,
        old=old,
    )
    assert got.seq == 7
    assert got.rank == 0
    assert got.events == (
        BlockStored(hashes, hashes[0], tokens, BLOCK, "lo", [["lo", "s"], None]),
        BlockRemoved(hashes),
        AllBlocksCleared(),
    )


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("none", [None, 0, b""])
def test_a_parent_of_nothing_is_none(old, none):
    (event,) = batch(stored([1] * BLOCK, [1], parent=none), old=old).events
    assert event.parent is None


def test_captured_from_vllm():
    """As vLLM 0.32 sends it (fields with default values left out)."""
    got = decode_batch(
        msgspec.msgpack.encode(
            [
                1795395043.567,
                [
                    {
                        "type": "BlockStored",
                        "block_hashes": [2558257725695544300, 4823663309940529604],
                        "parent_block_hash": None,
                        "token_ids": [2, *[281, 283, 224] * 2, 281],
                        "block_size": 4,
                        "lora_id": None,
                        "medium": "GPU",
                        "lora_name": None,
                        "extra_keys": [None, None],
                        "group_idx": 0,
                        "kv_cache_spec_kind": "full_attention",
                    }
                ],
                1,
            ]
        )
    )
    assert got.rank == 1
    normaliser = Normaliser(4, seed_for)
    changes = normaliser.apply(got)
    assert list(changes.stored) == keys_of([2, *[281, 283, 224] * 2, 281])
    assert normaliser.exact


def test_unknown_fields_events_and_missing_ends_are_no_errors():
    got = batch(
        stored([1] * BLOCK, [1], from_the_future={"a": 1}),
        {"type": "BlockMoved", "x": 1},
        ["Strange", 1],
        17,
        rank=None,
    )
    assert [type(event) for event in got.events] == [BlockStored]
    assert got.skipped == 3
    short = decode_batch(
        msgspec.msgpack.encode(
            [0.0, [["BlockStored", [1], None, [1, 2], 2], ["BlockRemoved", [1]]]]
        )
    )
    assert short.events == (BlockStored([1], None, [1, 2], 2), BlockRemoved([1]))


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"\xc1", "no msgpack"),
        (msgspec.msgpack.encode({"a": 1}), "timestamp"),
        (msgspec.msgpack.encode([0.0, [{"type": "BlockStored"}]]), "BlockStored.block_hashes"),
        (
            msgspec.msgpack.encode([0.0, [{"type": "BlockRemoved", "block_hashes": [[1]]}]]),
            "BlockRemoved.block_hashes",
        ),
        (
            msgspec.msgpack.encode([0.0, [stored([1], [1], block_size="4")]]),
            "BlockStored.block_size: str, expected int",
        ),
        (
            msgspec.msgpack.encode([0.0, [stored([1], [1], extra_keys=["a"])]]),
            "BlockStored.extra_keys",
        ),
    ],
)
def test_what_is_no_batch_says_what_is_wrong(payload, problem):
    with pytest.raises(Undecodable, match=problem):
        decode_batch(payload)


# --- meaning


def test_keys_are_the_pickers_own():
    """What the picker computes for a request is what the engine's events come to."""
    tokens = list(range(3 * BLOCK))
    normaliser, picker = Normaliser(BLOCK, seed_for), Picker()
    picker.apply(normaliser.apply(batch(stored(tokens, [1, 2, 3]))))
    picker.apply(
        normaliser.apply(
            batch(
                stored(
                    tokens,
                    [11, 12, 13],
                    lora_id=1,
                    lora_name="lo",
                    extra_keys=[["lo", "tenant"], ["lo"], ["lo"]],
                )
            )
        )
    )
    picker.apply(
        normaliser.apply(batch(stored(tokens, [21, 22, 23], extra_keys=[["tenant"], None, None])))
    )
    salted = block_extras("tenant")
    assert picker.cached == {
        *keys_of(tokens),
        *keys_of(tokens, "lo", salted),
        *keys_of(tokens, "", salted),
    }
    assert len(picker.cached) == 9
    assert normaliser.exact


def test_three_stored_three_removed():
    normaliser = Normaliser(BLOCK, seed_for)
    tokens = [5] * BLOCK
    (key,) = keys_of(tokens)
    assert list(normaliser.apply(batch(stored(tokens, [9]))).stored) == [key]
    assert not normaliser.apply(batch(stored(tokens, [9]), stored(tokens, [9])))
    assert not normaliser.apply(batch(removed(9), removed(9)))
    assert list(normaliser.apply(batch(removed(9))).removed) == [key]
    assert not normaliser.apply(batch(removed(9)))


def test_two_hashes_of_one_key():
    """An adapter loaded again from another path: other engine hashes, the same key."""
    normaliser = Normaliser(BLOCK, seed_for)
    fields = {"lora_id": 1, "lora_name": "lo", "extra_keys": [["lo"]]}
    assert normaliser.apply(batch(stored([1] * BLOCK, [1], **fields)))
    assert not normaliser.apply(batch(stored([1] * BLOCK, [2], **fields)))
    assert not normaliser.apply(batch(removed(1)))
    assert list(normaliser.apply(batch(removed(2))).removed) == keys_of([1] * BLOCK, "lo")


def test_orphans_are_kept_out_counted_and_forgotten():
    normaliser = Normaliser(BLOCK, seed_for)
    assert not normaliser.apply(batch(stored([1] * 2 * BLOCK, [2, 3], parent=1)))
    assert not normaliser.apply(batch(stored([2] * BLOCK, [4], parent=3)))
    assert normaliser.unchained == 3
    assert not normaliser.exact
    assert "3 cached blocks" in normaliser.why_not_exact
    # The engine stores the same prompt from its start: what can be chained is.
    tokens = [7] * BLOCK + [1] * 2 * BLOCK
    changes = normaliser.apply(batch(stored(tokens, [1, 2, 3])))
    assert list(changes.stored) == keys_of(tokens)
    assert not normaliser.exact
    # Hashes 2 and 3 are held twice: once as orphans, once chained.
    assert not normaliser.apply(batch(removed(3), removed(2)))
    assert list(normaliser.apply(batch(removed(3))).removed) == [keys_of(tokens)[2]]
    normaliser.apply(batch(removed(4)))
    assert normaliser.exact


def test_other_tiers_and_groups_are_not_mixed_in():
    normaliser = Normaliser(BLOCK, seed_for)
    tokens = [1] * BLOCK
    assert not normaliser.apply(
        batch(
            stored(tokens, [1], medium="CPU"),
            stored([], [1], medium="STORAGE"),
            stored(tokens, [1], group_idx=1),
            stored(tokens, [1], group_idx=0, kv_cache_spec_kind="mamba"),
        )
    )
    assert normaliser.ignored == 4
    assert normaliser.apply(batch(stored(tokens, [1])))
    assert not normaliser.apply(batch(removed(1, medium="CPU"), removed(1, group_idx=1)))
    assert normaliser.exact
    assert normaliser.cached() == set(keys_of(tokens))


def test_the_group_of_full_attention_need_not_be_the_first():
    normaliser = Normaliser(BLOCK, seed_for)
    tokens = [1] * BLOCK
    window = {"group_idx": 0, "kv_cache_spec_kind": "sliding_window"}
    full = {"group_idx": 1, "kv_cache_spec_kind": "full_attention"}
    assert not normaliser.apply(batch(stored(tokens, [1], **window)))
    assert normaliser.apply(batch(stored(tokens, [1], **full)))
    assert not normaliser.apply(batch(removed(1, group_idx=0)))
    assert normaliser.apply(batch(removed(1, group_idx=1)))


def test_another_block_size_is_said():
    normaliser = Normaliser(BLOCK, seed_for)
    assert not normaliser.apply(batch(stored([1] * 8, [1], block_size=8)))
    assert not normaliser.exact
    assert "8 tokens a block" in normaliser.why_not_exact
    assert str(BLOCK) in normaliser.why_not_exact


@pytest.mark.parametrize(
    "event",
    [
        stored([1] * BLOCK, [1], lora_id=1),  # an adapter without a name
        stored([1] * (BLOCK - 1), [1]),
        stored(["a"] * BLOCK, [1]),
    ],
)
def test_what_cannot_be_chained_is_not_guessed(event):
    normaliser = Normaliser(BLOCK, seed_for)
    assert not normaliser.apply(batch(event))
    assert not normaliser.exact
    normaliser.apply(batch(removed(1)))
    assert normaliser.exact


def test_a_gap_is_inexact_until_it_is_filled():
    normaliser = Normaliser(BLOCK, seed_for)
    normaliser.apply(batch(stored([1] * BLOCK, [1])))
    assert not normaliser.apply(Gap())
    assert not normaliser.exact
    assert normaliser.why_not_exact == "some of the engine's events are missing, and asked for"
    assert len(normaliser.cached()) == 1
    normaliser.apply(batch(stored([2] * BLOCK, [2])))
    assert normaliser.exact


def test_lost_batches_end_exactness_until_the_next_clear():
    normaliser, picker = Normaliser(BLOCK, seed_for), Picker()
    picker.apply(normaliser.apply(batch(stored([1] * BLOCK, [1]))))
    picker.apply(normaliser.apply(Missed(3, 4)))
    assert picker.cached == set()
    assert not normaliser.exact
    picker.apply(normaliser.apply(Caught()))
    assert not normaliser.exact
    picker.apply(normaliser.apply(batch(CLEARED)))
    assert normaliser.exact
    normaliser.apply(Missed(6, 6))
    assert normaliser.apply(Restarted()).cleared
    assert normaliser.exact


# --- against a model


class Engine:
    """A paged cache that names blocks by its own hash and holds any number of copies."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names: dict[tuple, int] = {}
        self.copies: Counter[tuple] = Counter()  # (lora, salt, tokens of the whole prefix)

    def name(self, prefix: tuple) -> int:
        return self.names.setdefault(prefix, self.rng.getrandbits(64))

    def store(self, lora: str, salt: str, tokens: tuple[int, ...], first: int) -> dict | None:
        """Blocks from `first` on of a prompt, whose parent must be cached."""
        blocks = [
            (lora, salt, tokens[: BLOCK * (index + 1)]) for index in range(len(tokens) // BLOCK)
        ]
        if first >= len(blocks) or (first and not self.copies[blocks[first - 1]]):
            return None
        self.copies.update(blocks[first:])
        extra_keys = []
        for index in range(first, len(blocks)):
            entries = ([lora] if lora else []) + ([salt] if salt and index == 0 else [])
            extra_keys.append(entries or None)
        return stored(
            list(tokens[BLOCK * first :]),
            [self.name(block) for block in blocks[first:]],
            parent=self.name(blocks[first - 1]) if first else None,
            lora_id=1 if lora else None,
            lora_name=lora or None,
            extra_keys=extra_keys,
        )

    def remove(self, pick: int) -> dict | None:
        held = sorted(self.copies.elements())
        if not held:
            return None
        block = held[pick % len(held)]
        self.copies[block] -= 1
        return removed(self.name(block))

    def keys(self) -> set[int]:
        return {
            keys_of(list(tokens), lora, block_extras(salt))[-1]
            for (lora, salt, tokens), count in self.copies.items()
            if count
        }


class NormaliserMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32), old=st.booleans())
    def begin(self, seed, old):
        self.rng = random.Random(seed)
        self.old = old
        self.engine = Engine(self.rng)
        self.normaliser = Normaliser(BLOCK, seed_for)
        self.picker = Picker()
        self.queued: list[dict] = []

    @rule(
        lora=st.sampled_from(["", "lo"]),
        salt=st.sampled_from(["", "s", "lo"]),
        blocks=st.lists(st.integers(0, 1), min_size=1, max_size=4),
        first=st.integers(0, 3),
    )
    def store(self, lora, salt, blocks, first):
        tokens = tuple(token for block in blocks for token in [block] * BLOCK)
        event = self.engine.store(lora, salt, tokens, first)
        if event is not None:
            self.queued.append(event)

    @rule(pick=st.integers(0, 100))
    def remove(self, pick):
        event = self.engine.remove(pick)
        if event is not None:
            self.queued.append(event)

    @rule()
    def clear(self):
        self.engine.copies.clear()
        self.queued.append(CLEARED)

    @rule()
    def restart(self):
        self.send()
        self.engine = Engine(self.rng)
        self.picker.apply(self.normaliser.apply(Restarted()))

    @rule()
    def send(self):
        events, self.queued = self.queued, []
        self.picker.apply(self.normaliser.apply(batch(*events, old=self.old)))

    @invariant()
    def same_world(self):
        if hasattr(self, "engine") and not self.queued:
            assert self.picker.cached == self.engine.keys() == self.normaliser.cached()
            assert self.normaliser.exact
            assert self.normaliser.unchained == 0


TestNormaliser = NormaliserMachine.TestCase
TestNormaliser.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
