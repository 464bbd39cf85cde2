"""Paged KV blocks with prefix caching, as vLLM's block pool keeps them.

Kept apart from the scheduler because it is the part that a router must predict exactly: which
blocks are cached, which are evicted first, and what is announced about them. The rules:

- Block 0 is never handed out (vLLM's null block), so a pool of n blocks holds n - 1.
- Only full blocks are cached, under a hash that is chained from the start of the sequence.
- A free block that has a hash stays cached until it is handed out again. Free blocks are handed
  out from the front of one queue: blocks without content worth keeping are put at its front, the
  cached blocks of a finished sequence at its end, last block first, so that a prefix outlives
  what was built on it.
- Two sequences that compute the same content at once hold it twice, under one hash: it is
  announced twice, and removed twice.
"""

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynamo_workers.sim.adapters import Adapter


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive full blocks became cached. `salts` has one entry a block, None for none."""

    hashes: tuple[bytes, ...]
    parent: bytes | None
    tokens: tuple[int, ...]
    salts: tuple[str | None, ...]
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Removed:
    """One block was handed out again and its content is gone."""

    hash: bytes


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing is cached any more."""


Event = Stored | Removed | Cleared


def none_hash(seed: str | None = None) -> bytes:
    """The parent of every first block; vLLM takes PYTHONHASHSEED as `seed` where it is set."""
    return _digest("vllm-none-hash" if seed is None else seed)


def block_hash(
    parent: bytes, tokens: Sequence[int], salt: str | None, adapter: Adapter | None = None
) -> bytes:
    """vLLM's hash of one full block (`--prefix-caching-hash-algo sha256`), 32 bytes.

    `parent` is the hash before it or `none_hash()`; `salt` goes into a first block only, an adapter
    into each.
    """
    extra: tuple[tuple[str, ...], ...] = ()
    if adapter is not None:
        extra += (("lora", adapter.name, adapter.path),)
    if salt is not None:
        extra += (("cache_salt", salt),)
    return _digest((parent, tuple(tokens), extra or None))


def _digest(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, protocol=5)).digest()


class BlockPool:
    """Blocks by number, 0 reserved; `caching=False` keeps no content and announces nothing."""

    def __init__(self, total: int, *, caching: bool = True) -> None:
        if total < 2:
            raise ValueError(f"a pool needs at least 2 blocks (one is reserved), got {total}")
        self.total = total
        self.caching = caching
        self._users = [0] * total  # sequences that hold the block
        self._hash_of: list[bytes | None] = [None] * total
        # Every block with no user, in the order in which they are handed out.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, total))
        # hash -> blocks with that content, the one that is found first in front; never empty.
        self._cached: dict[bytes, OrderedDict[int, None]] = {}
        self._events: list[Event] = []

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def used_count(self) -> int:
        return self.total - 1 - len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that some sequence holds, 0 to 1."""
        return self.used_count / (self.total - 1)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix; they are not held yet (see `hold`)."""
        found = []
        for key in hashes:
            blocks = self._cached.get(key)
            if blocks is None:
                break
            found.append(next(iter(blocks)))
        return found

    def free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds, so that holding them leaves fewer free."""
        return sum(1 for block in blocks if self._users[block] == 0)

    def hold(self, blocks: Iterable[int]) -> None:
        """Adds a user to blocks that `find` returned."""
        for block in blocks:
            if self._users[block] == 0:
                del self._free[block]
            self._users[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks to write to; what they had cached is evicted. The caller checks space."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        taken = []
        for _ in range(count):
            block, _nothing = self._free.popitem(last=False)
            self._evict(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def store(
        self,
        blocks: Sequence[int],
        hashes: Sequence[bytes],
        parent: bytes | None,
        tokens: Sequence[int],
        salt: str | None,
        adapter: Adapter | None = None,
    ) -> None:
        """Caches held, filled, consecutive blocks; `parent` is None where they start a sequence."""
        if not self.caching or not blocks:
            return
        for block, key in zip(blocks, hashes, strict=True):
            self._hash_of[block] = key
            self._cached.setdefault(key, OrderedDict())[block] = None
        salts: tuple[str | None, ...] = (None,) * len(blocks)
        if parent is None and salt is not None:
            salts = (salt, *salts[1:])
        self._events.append(Stored(tuple(hashes), parent, tuple(tokens), salts, adapter))

    def release(self, blocks: Sequence[int]) -> None:
        """Ends one user's hold on a sequence's blocks, given in the sequence's order."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def reset(self) -> bool:
        """Forgets everything cached; refused (False) while a sequence holds blocks."""
        if self.used_count:
            return False
        self._hash_of = [None] * self.total
        self._cached.clear()
        self._events.append(Cleared())
        return True

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def _evict(self, block: int) -> None:
        key = self._hash_of[block]
        if key is None:
            return
        self._hash_of[block] = None
        blocks = self._cached[key]
        del blocks[block]
        if not blocks:
            del self._cached[key]
        self._events.append(Removed(key))
