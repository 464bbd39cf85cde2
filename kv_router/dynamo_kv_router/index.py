"""Prefix index: which worker holds how many leading blocks of a prompt.

A block key names its whole prefix (`keys`), so no tree is needed: one dict from key to the set of
workers that hold the block, as an int bitmask. A match intersects the masks of a prompt's keys
from the front.

Prompts share their beginnings, and hundreds of dict lookups cost more than everything else in a
match. So a direct-mapped cache of masks stands before the dict, in numpy arrays that answer for
all keys of a prompt at once. Whatever changes a mask empties its place in the cache, or fills it
anew, before the next match: answers are always the dict's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat, takewhile

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64] | Sequence[int]
_Array = npt.NDArray[np.uint64]

_LOG_SLACK = 4_096


class BlockIndex:
    """Blocks held by each worker. Workers are small ints (slots), reused by the caller.

    Storing what is stored and removing what is not are no errors and change nothing: counts for
    duplicated blocks live where the engine's events are read (`normaliser`).
    """

    __slots__ = ("_cache", "_holders", "_mine")

    def __init__(self) -> None:
        # Key -> bitmask of the workers that hold the block; never 0.
        self._holders: dict[int, int] = {}
        self._mine: dict[int, _Holdings] = {}
        self._cache = _MaskCache()

    def __len__(self) -> int:
        """Different blocks that at least one worker holds."""
        return len(self._holders)

    def blocks(self, worker: int) -> int:
        """How many blocks the worker holds."""
        mine = self._mine.get(worker)
        return 0 if mine is None else mine.count

    def store(self, worker: int, keys: Keys) -> None:
        """The worker holds these blocks from now on, besides those it held."""
        if not len(keys):
            return
        added = _own_array(keys)
        mine = self._mine.get(worker)
        if mine is None:
            mine = self._mine[worker] = _Holdings()
            self._cache.cover(worker)
        mine.log.append(added)
        mine.logged += len(added)
        holders = self._holders
        bit = 1 << worker
        items = added.tolist()
        size = len(holders)
        # Inserts what nobody holds, in C; says who holds the rest.
        masks = list(map(holders.setdefault, items, repeat(bit)))
        fresh = len(holders) - size
        mine.count += fresh
        if fresh == len(items):
            self._cache.changed(added, worker)
        else:
            self._cache.changed(added)
            for key, mask in zip(items, masks, strict=True):
                if not mask & bit:
                    mask = holders[key]  # a key given twice has it by now
                    if not mask & bit:
                        holders[key] = mask | bit
                        mine.count += 1
        if mine.logged > 2 * mine.count + _LOG_SLACK:
            self._compact(worker, mine)

    def remove(self, worker: int, keys: Keys) -> None:
        """The worker holds these blocks no more."""
        mine = self._mine.get(worker)
        if mine is None or not len(keys):
            return
        removed = _own_array(keys)
        self._cache.changed(removed)
        mine.count -= self._drop(worker, removed)
        if mine.count == 0:
            del self._mine[worker]

    def clear(self, worker: int) -> None:
        """The worker holds no block. Costs time in proportion to the blocks it held."""
        mine = self._mine.pop(worker, None)
        if mine is not None:
            held = np.concatenate(mine.log)
            self._cache.changed(held)
            self._drop(worker, held)

    def match(self, keys: Keys) -> dict[int, int]:
        """Worker -> how many leading blocks of `keys` it holds; workers that hold none are absent.

        A block counts only if the worker holds every block before it.
        """
        if not len(keys) or int(keys[0]) not in self._holders:
            return {}
        wanted = keys if isinstance(keys, np.ndarray) else _own_array(keys)
        found: dict[int, int] = {}
        for word, masks in enumerate(self._cache.masks(wanted, self._holders)):
            np.bitwise_and.accumulate(masks, out=masks)
            left, last = int(masks[0]), int(masks[-1])
            if left != last:
                # Workers leave one after the other; note each where it left.
                ends = (masks[1:] != masks[:-1]).nonzero()[0]
                ends += 1
                for depth, still in zip(ends.tolist(), masks[ends].tolist(), strict=True):
                    gone = left ^ still
                    if gone & (gone - 1):
                        found.update(dict.fromkeys(_workers(word, gone), depth))
                    else:
                        found[64 * word + gone.bit_length() - 1] = depth
                    left = still
            if last:
                found.update(dict.fromkeys(_workers(word, last), len(masks)))
        return found

    def _drop(self, worker: int, keys: _Array) -> int:
        """Take the worker from the holders of these keys; how many of them it held."""
        holders = self._holders
        get = holders.get
        bit = 1 << worker
        dropped = 0
        for key in keys.tolist():
            mask = get(key, 0)
            if mask & bit:
                dropped += 1
                if mask == bit:
                    del holders[key]
                else:
                    holders[key] = mask ^ bit
        return dropped

    def _compact(self, worker: int, mine: _Holdings) -> None:
        """Drop from the worker's log what it holds no more."""
        bit = 1 << worker
        logged = np.unique(np.concatenate(mine.log)).tolist()
        held = [key for key in logged if self._holders.get(key, 0) & bit]
        mine.log = [np.array(held, dtype=np.uint64)]
        mine.logged = len(held)


class _Holdings:
    """What one worker holds: how much, and where to look when it is cleared."""

    __slots__ = ("count", "log", "logged")

    def __init__(self) -> None:
        self.count = 0
        # Every key stored since the last compaction, among them removed and repeated ones.
        self.log: list[_Array] = []
        self.logged = 0


class _MaskCache:
    """Masks of keys that were asked for lately, also of keys that nobody holds.

    Direct-mapped: a key has one place, which it shares with others; the last one asked for is in.
    16 bytes a place, 8 more for each 64 workers above the first.
    """

    __slots__ = ("_changed", "_changes", "_keys", "_masks")

    _PLACES_LOG2 = 17
    _SHIFT = np.uint64(64 - _PLACES_LOG2)
    # Multiplicative hashing: the golden ratio of 2^64, odd.
    _MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
    # An empty place has a key that belongs elsewhere: 0, whose place is 0, and there 1.
    _EMPTY = np.uint64(0)
    _EMPTY_AT_0 = np.uint64(1)
    _MAX_CHANGES = 1 << 16

    def __init__(self) -> None:
        places = 1 << self._PLACES_LOG2
        self._keys = np.full(places, self._EMPTY, dtype=np.uint64)
        self._keys[0] = self._EMPTY_AT_0
        # One array for each 64 workers.
        self._masks = [np.zeros(places, dtype=np.uint64)]
        # What changed since the last match, in order: keys, and their only holder (-1: unknown).
        self._changed: list[tuple[_Array, int]] = []
        self._changes = 0

    def cover(self, worker: int) -> None:
        """Masks from now on have a bit for this worker."""
        while worker // 64 >= len(self._masks):
            self._masks.append(np.zeros_like(self._keys))

    def changed(self, keys: _Array, holder: int = -1) -> None:
        """The masks of these keys changed; `holder`: the one worker that holds them, if known.

        `keys` is kept.
        """
        self._changed.append((keys, holder))
        self._changes += len(keys)
        if self._changes > self._MAX_CHANGES:
            self._keys.fill(self._EMPTY)
            self._keys[0] = self._EMPTY_AT_0
            self._changed.clear()
            self._changes = 0

    def _settle(self) -> None:
        """Take the changes in. Of several for one place the last counts."""
        keys = np.concatenate([keys for keys, _ in self._changed])
        holders = [holder for _, holder in self._changed]
        places = self._places(keys)
        if max(holders) < 0:
            self._keys[places] = self._EMPTY
        else:
            lengths = [len(keys) for keys, _ in self._changed]
            if -1 in holders:
                keys[np.repeat([holder < 0 for holder in holders], lengths)] = self._EMPTY
            self._keys[places] = keys
            for word, masks in enumerate(self._masks):
                bits = [1 << holder % 64 if holder // 64 == word else 0 for holder in holders]
                masks[places] = np.repeat(np.array(bits, dtype=np.uint64), lengths)
        if self._keys[0] == self._EMPTY:
            self._keys[0] = self._EMPTY_AT_0
        self._changed.clear()
        self._changes = 0

    def masks(self, keys: _Array, holders: dict[int, int]) -> list[_Array]:
        """Masks of the leading keys up to the first that nobody holds, fresh arrays.

        One array for each 64 workers, all of the same length, at most that of `keys`.
        """
        if self._changes:
            self._settle()
        places = self._places(keys)
        missed = (self._keys.take(places) != keys).nonzero()[0]
        if len(missed):
            # What was missed, up to the first that nobody holds.
            wanted = keys[missed].tolist()
            values = list(takewhile(bool, map(holders.get, wanted, repeat(0))))
            if len(values) < len(missed):
                places = places[: missed[len(values)]]
                missed = missed[: len(values)]
            at = places[missed]
            self._keys[at] = keys[missed]
            masks = []
            for word, cached in enumerate(self._masks):
                part = _word(values, word, len(self._masks))
                answer = cached.take(places)
                answer[missed] = part
                cached[at] = part
                masks.append(answer)
            return masks
        return [cached.take(places) for cached in self._masks]

    def _places(self, keys: _Array) -> npt.NDArray[np.int64]:
        places = keys * self._MULTIPLIER
        places >>= self._SHIFT
        return places.view(np.int64)  # numpy indexes faster with its own index type


def _word(masks: list[int], word: int, words: int) -> _Array:
    if words > 1:
        masks = [mask >> (64 * word) & 0xFFFF_FFFF_FFFF_FFFF for mask in masks]
    return np.fromiter(masks, dtype=np.uint64, count=len(masks))


def _own_array(keys: Keys) -> _Array:
    """A copy if the caller could reuse its array; a read-only one, as messages have, is kept."""
    if isinstance(keys, np.ndarray):
        return keys.astype(np.uint64, copy=True) if keys.flags.writeable else keys
    return np.fromiter(keys, dtype=np.uint64, count=len(keys))


@lru_cache(maxsize=4_096)
def _workers(word: int, mask: int) -> tuple[int, ...]:
    """The workers of a mask, whose lowest bit is worker 64 * word."""
    return tuple(64 * word + bit for bit in range(mask.bit_length()) if mask >> bit & 1)
