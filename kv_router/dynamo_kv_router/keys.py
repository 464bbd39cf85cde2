"""Block keys: a 64-bit name for each full block of a token sequence together with all before it.

A picker computes them from a request's tokens, a worker from its engine's cache events; equal
prefixes must get equal keys in every process, and a later piece of a sequence must continue from
the key of the block before it, because events arrive in pieces.

Construction, all arithmetic modulo 2^64, B tokens per block, block i = t[0..B-1]:

    h_i = (B * L + sum over j of t[j] * M[j]) xor E_i
    f_i = mix(h_i)
    key_i = key_(i-1) * P + f_i

E_i is the BLAKE2b-64 of the block's extras, 0 without; mix is splitmix64's finalizer, a bijection;
key_(-1) is the model's seed. L and M are odd constants drawn from SHAKE-256, P is one with
P mod 8 = 5. h is the multilinear hash
(Carter and Wegman 1979; Lemire and Kaser, "Strongly universal string hashing is fast", 2014), the
chain is a polynomial over the block hashes, which a prefix sum computes for all blocks at once:
key_i = P^(i+1) * (seed + sum over j <= i of f_j * P^-(j+1)). A key is the whole state of its
chain, so continuing from a parent key is the same as starting with it as seed.

Collisions, for data that was not chosen against the constants:

- Two blocks that differ in one token never share h. Blocks that differ in more share it with
  probability at most 2^-(63 - v), where 2^v is the largest power of two that divides every
  difference of tokens; v is near 0 for real text and below 18 for every real vocabulary.
- Equal blocks after different prefixes (or seeds) never share a key: P is odd.
- Sequences that differ in several blocks share a key with probability about 2^-64. Exchanged or
  repeated blocks k apart lose about log2(k) + 2 bits of it: 2^-52 for two blocks exchanged at the
  ends of 8,192 tokens in blocks of 16.
- With n different blocks in the fleet some two collide with probability about n^2 / 2^65:
  3e-6 for ten million. A collision sends a request to a worker that holds less than was thought,
  which costs time and nothing else.

**Keys are no security boundary.** The constants are public and the hash is linear within a block:
who chooses tokens freely can make keys collide. Engines check their own hashes before they reuse
a block, so that misleads a choice of worker and never an answer.
"""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer[Any]] | Sequence[int]
Keys = npt.NDArray[np.uint64]
"""Shape (blocks,)."""

_MASK = 2**64 - 1
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def _constants(purpose: bytes, count: int) -> list[int]:
    """Nothing up the sleeve: uint64 constants from a hash of what they are for."""
    stream = hashlib.shake_256(b"dynamo-platform block keys v1: " + purpose).digest(8 * count)
    return [int.from_bytes(stream[i : i + 8], "little") for i in range(0, len(stream), 8)]


_LENGTH_MULTIPLIER = _constants(b"length", 1)[0] | 1
_CHAIN = _constants(b"chain", 1)[0] & ~7 | 5
_CHAIN_INVERSE = pow(_CHAIN, -1, 2**64)


@functools.lru_cache(maxsize=64)
def _multipliers(block_size: int) -> tuple[Keys, np.uint64]:
    """Odd multipliers M[0..B-1], and B * L. The M of a smaller block begin a larger one's."""
    multipliers = np.array(_constants(b"tokens", block_size), dtype=np.uint64) | np.uint64(1)
    multipliers.setflags(write=False)
    return multipliers, np.uint64(block_size * _LENGTH_MULTIPLIER & _MASK)


@functools.lru_cache(maxsize=32)
def _powers(capacity: int) -> tuple[Keys, Keys]:
    """(P^1, P^2, …) and (P^-1, P^-2, …), `capacity` of each."""
    powers = np.full(capacity, _CHAIN, dtype=np.uint64)
    inverses = np.full(capacity, _CHAIN_INVERSE, dtype=np.uint64)
    np.cumprod(powers, out=powers)
    np.cumprod(inverses, out=inverses)
    powers.setflags(write=False)
    inverses.setflags(write=False)
    return powers, inverses


def model_seed(model: str, lora: str = "") -> int:
    """Where a model's chains start: the key of the empty prefix, 64 bits.

    `lora` is the adapter's name, "" without one.
    """
    name = f"{len(model)}:{model}{lora}".encode()
    return int.from_bytes(
        hashlib.blake2b(name, digest_size=8, person=b"dyn-model").digest(), "little"
    )


def _words(tokens: Tokens) -> Keys:
    """Token ids as uint64."""
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise TypeError(
                f"tokens: array of {tokens.dtype} with {tokens.ndim} dimensions, "
                "expected integers in one dimension"
            )
        # Negative ids wrap in the same way as from a list.
        return tokens.astype(np.uint64, copy=False)
    try:
        # Several times faster than numpy's own conversion of a list.
        return np.frombuffer(array("I", tokens), dtype=np.uint32).astype(np.uint64)
    except OverflowError:
        pass  # negative, or more than 32 bits
    except TypeError as error:
        raise TypeError(f"tokens: expected integers: {error}") from error
    try:
        return np.frombuffer(array("q", tokens), dtype=np.uint64)
    except OverflowError as error:
        raise TypeError(f"tokens: expected integers of at most 63 bits: {error}") from error


def block_keys(
    tokens: Tokens,
    block_size: int,
    *,
    seed: int,
    extras: Sequence[bytes] = (),
    parent: int | None = None,
) -> Keys:
    """Keys of the full blocks of `tokens`, in order; shape (len(tokens) // block_size,).

    seed: `model_seed(...)`, used where there is no parent.
    extras: what else the block's content depends on, `extras[i]` for block i; b"" = nothing;
      missing ones at the end = nothing. It changes the keys of block i and of all after it.
    parent: key of the block before the first, if the sequence continues one.
    """
    if block_size < 1:
        raise ValueError(f"block_size: {block_size}, must be at least 1")
    count = len(tokens) // block_size
    if count == 0:
        return np.empty(0, dtype=np.uint64)
    words = _words(tokens)[: count * block_size]
    multipliers, length = _multipliers(block_size)
    hashes = words.reshape(count, block_size) @ multipliers
    hashes += length
    if extras:
        for index, extra in enumerate(extras[:count]):
            if extra:
                digest = hashlib.blake2b(extra, digest_size=8, person=b"dyn-extra").digest()
                hashes[index] ^= np.uint64(int.from_bytes(digest, "little"))
    hashes ^= hashes >> _SHIFT_1
    hashes *= _MIX_1
    hashes ^= hashes >> _SHIFT_2
    hashes *= _MIX_2
    hashes ^= hashes >> _SHIFT_3
    powers, inverses = _powers(1 << max(6, (count - 1).bit_length()))
    hashes *= inverses[:count]
    # A slice, since an array wraps silently and a scalar warns.
    first = hashes[:1]
    first += np.uint64((seed if parent is None else parent) & _MASK)
    np.add.accumulate(hashes, out=hashes)
    hashes *= powers[:count]
    return hashes
