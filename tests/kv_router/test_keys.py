"""Block keys against a slow model of the same formula, and the properties others rely on."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
from dynamo_kv_router.extras import block_extras, engine_extras
from dynamo_kv_router.keys import block_keys, model_seed
from hypothesis import given
from hypothesis import strategies as st

MASK = 2**64 - 1
token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=80)
block_sizes = st.integers(1, 20)
seeds = st.integers(0, MASK)
extras_lists = st.lists(st.binary(max_size=3), max_size=6)


def constants(purpose: str, count: int) -> list[int]:
    data = hashlib.shake_256(b"dynamo-platform block keys v1: " + purpose.encode())
    stream = data.digest(8 * count)
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(count)]


def slow_keys(tokens, block_size, seed, extras=()):
    """The formula of the module's docstring, in Python's integers."""
    multipliers = [m | 1 for m in constants("tokens", block_size)]
    length = constants("length", 1)[0] | 1
    chain = constants("chain", 1)[0] // 8 * 8 + 5
    keys, key = [], seed
    for index in range(len(tokens) // block_size):
        block = tokens[index * block_size : (index + 1) * block_size]
        h = block_size * length + sum(t * m for t, m in zip(block, multipliers, strict=True))
        h &= MASK
        if index < len(extras) and extras[index]:
            digest = hashlib.blake2b(extras[index], digest_size=8, person=b"dyn-extra").digest()
            h ^= int.from_bytes(digest, "little")
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & MASK
        h = (h ^ h >> 27) * 0x94D049BB133111EB & MASK
        h ^= h >> 31
        key = (key * chain + h) & MASK
        keys.append(key)
    return keys


@given(token_lists, block_sizes, seeds, extras_lists)
def test_equals_the_slow_model(tokens, block_size, seed, extras):
    keys = block_keys(tokens, block_size, seed=seed, extras=extras)
    assert keys.dtype == np.uint64
    assert keys.tolist() == slow_keys(tokens, block_size, seed, extras)


@given(token_lists, block_sizes, seeds, st.data())
def test_a_prefix_has_the_prefix_of_the_keys(tokens, block_size, seed, data):
    cut = data.draw(st.integers(0, len(tokens)))
    whole = block_keys(tokens, block_size, seed=seed).tolist()
    assert block_keys(tokens[:cut], block_size, seed=seed).tolist() == whole[: cut // block_size]


@given(token_lists, block_sizes, seeds, extras_lists, st.data())
def test_continuing_from_a_parent_equals_the_whole(tokens, block_size, seed, extras, data):
    whole = block_keys(tokens, block_size, seed=seed, extras=extras).tolist()
    first = data.draw(st.integers(0, len(whole)))
    parent = whole[first - 1] if first else None
    rest = block_keys(
        tokens[first * block_size :],
        block_size,
        seed=seed if parent is None else 12345,  # unused with a parent
        extras=extras[first:],
        parent=parent,
    )
    assert rest.tolist() == whole[first:]


@given(token_lists, block_sizes, seeds)
def test_list_and_arrays_agree(tokens, block_size, seed):
    expected = block_keys(tokens, block_size, seed=seed).tolist()
    for dtype in (np.uint32, np.int64, np.uint64):
        array = np.array(tokens, dtype=dtype)
        assert block_keys(array, block_size, seed=seed).tolist() == expected
    assert block_keys(tuple(tokens), block_size, seed=seed).tolist() == expected


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), block_sizes, seeds)
def test_negative_placeholders_agree_too(tokens, block_size, seed):
    expected = block_keys(tokens, block_size, seed=seed).tolist()
    for dtype in (np.int32, np.int64):
        array = np.array(tokens, dtype=dtype)
        assert block_keys(array, block_size, seed=seed).tolist() == expected


@given(token_lists.filter(bool), block_sizes, seeds, st.data())
def test_a_changed_token_changes_its_block_and_all_after(tokens, block_size, seed, data):
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = list(tokens)
    changed[at] = data.draw(st.integers(0, 2**32 - 1).filter(lambda t: t != tokens[at]))
    before = block_keys(tokens, block_size, seed=seed).tolist()
    after = block_keys(changed, block_size, seed=seed).tolist()
    first = at // block_size
    assert after[:first] == before[:first]
    assert all(a != b for a, b in zip(after[first:], before[first:], strict=True))


@given(token_lists, block_sizes, seeds, extras_lists, st.data())
def test_an_extra_changes_its_block_and_all_after(tokens, block_size, seed, extras, data):
    count = len(tokens) // block_size
    extras = [*extras, *[b""] * count][:count]
    before = block_keys(tokens, block_size, seed=seed, extras=extras).tolist()
    if not count:
        return
    at = data.draw(st.integers(0, count - 1))
    changed = list(extras)
    changed[at] += b"x"
    after = block_keys(tokens, block_size, seed=seed, extras=changed).tolist()
    assert after[:at] == before[:at]
    assert all(a != b for a, b in zip(after[at:], before[at:], strict=True))


@given(token_lists, block_sizes, seeds, seeds)
def test_another_seed_changes_every_key(tokens, block_size, seed, other):
    a = block_keys(tokens, block_size, seed=seed).tolist()
    b = block_keys(tokens, block_size, seed=other).tolist()
    assert all((x != y) == (seed != other) for x, y in zip(a, b, strict=True))


def test_no_collisions_where_structure_is_worst():
    """Repeated, exchanged and shifted blocks, small alphabets, zeros: all keys differ."""
    rng = random.Random(3)
    seen: dict[int, bytes] = {}
    patterns = [[0], [1], [0, 1], [1, 0], [0, 0, 1], [5, 5, 6, 6], list(range(16))]
    patterns += [[rng.randrange(2) for _ in range(64)] for _ in range(200)]
    patterns += [[rng.randrange(150_000) << 1 for _ in range(64)] for _ in range(200)]
    blocks = [[rng.randrange(1_000) for _ in range(4)] for _ in range(8)]
    for _ in range(400):
        order = [blocks[rng.randrange(8)] for _ in range(64)]
        patterns.append([token for block in order for token in block])
    for pattern in patterns:
        tokens = (pattern * (4 * 256 // len(pattern) + 1))[: 4 * 256]
        prefix = hashlib.sha256()
        for index, key in enumerate(block_keys(tokens, 4, seed=1).tolist()):
            prefix.update(repr(tokens[4 * index : 4 * index + 4]).encode())
            digest = prefix.digest()
            assert seen.setdefault(key, digest) == digest
    assert len(seen) > 100_000


def test_keys_are_the_same_in_every_process():
    """Workers and pickers meet by these values, also across versions: they may not change."""
    code = (
        "from dynamo_kv_router.keys import *;"
        "print(block_keys(list(range(64)), 16, seed=model_seed('tiny', 'a'),"
        " extras=[b'', b'salt']).tolist())"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert answers == {
        "[1380258287389864963, 621781436013363122, 8434413178982563295, 17236894908938902120]\n"
    }


def test_seeds_tell_models_and_adapters_apart():
    names = [("a", ""), ("a", "b"), ("ab", ""), ("", "ab"), ("b", "a"), ("", ""), ("1:a", "")]
    assert len({model_seed(*name) for name in names}) == len(names)
    assert all(0 <= model_seed(*name) <= MASK for name in names)


def test_clear_errors():
    with pytest.raises(ValueError, match="block_size: 0"):
        block_keys([1], 0, seed=0)
    with pytest.raises(TypeError, match="expected integers"):
        block_keys(["a"] * 4, 4, seed=0)
    with pytest.raises(TypeError, match="at most 63 bits"):
        block_keys([2**70] * 4, 4, seed=0)
    with pytest.raises(TypeError, match="array of float64"):
        block_keys(np.ones(4), 4, seed=0)
    with pytest.raises(TypeError, match="2 dimensions"):
        block_keys(np.ones((4, 4), dtype=np.uint32), 4, seed=0)


# --- extras: what the picker writes is what the worker reads


@pytest.mark.parametrize(
    ("entries", "lora", "expected"),
    [
        (None, None, b""),
        ([], None, b""),
        (["lo1"], "lo1", b""),
        ([["lora", "lo1", "/path"]], "lo1", b""),
        (["tenant-a"], None, block_extras("tenant-a")[0]),
        ([["cache_salt", "tenant-a"]], None, block_extras("tenant-a")[0]),
        (["lo1", "tenant-a"], "lo1", block_extras("tenant-a")[0]),
        (
            [["lora", "lo1", "/p"], ["cache_salt", "tenant-a"]],
            "lo1",
            block_extras("tenant-a")[0],
        ),
        (["lo1", "lo1"], "lo1", block_extras("lo1")[0]),  # a salt that is the adapter's name
        ([["img", 3]], None, block_extras(None, [[("img", 3)]])[0]),
        ([["mm", "img", 3]], None, block_extras(None, [[("img", 3)]])[0]),
        (
            ["lo1", ["img", -4], ["img2", 0], "s"],
            "lo1",
            block_extras("s", [[("img", -4), ("img2", 0)]])[0],
        ),
        ([("img", 3)], None, block_extras(None, [[("img", 3)]])[0]),
    ],
)
def test_engines_and_requests_give_the_same_bytes(entries, lora, expected):
    assert engine_extras(entries, lora) == expected


def test_extras_tell_requests_apart():
    requests = [
        block_extras(),
        block_extras("a"),
        block_extras("b"),
        block_extras(None, [[("a", 0)]]),
        block_extras(None, [[("a", 1)]]),
        block_extras("a", [[("a", 1)]]),
        block_extras(None, [[("a", 1), ("b", 2)]]),
    ]
    assert len({tuple(extras) for extras in requests}) == len(requests)
    assert block_extras("", []) == []
    assert block_extras(None, [[], [("a", 0)]])[0] == b""
    assert engine_extras([b"digest"], None) != b""
