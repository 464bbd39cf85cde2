"""From an engine's events to block keys that enter and leave its cache.

Engines name blocks by hashes of their own and report a block as often as they hold it; pickers want
keys that all workers share, each at most once. The normaliser keeps the map between the two and
counts, so that what comes out are the moments when a key becomes cached or stops being so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dynamo_kv_router.engine_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Caught,
    Gap,
    Hash,
    Item,
    Missed,
    Restarted,
)
from dynamo_kv_router.extras import engine_extras
from dynamo_kv_router.keys import block_keys

FULL_ATTENTION = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of cache group that keep each block of a prefix; others keep a window or a state."""


@dataclass(slots=True)
class Changes:
    """What a batch did to the cache. ``cleared`` comes before ``stored`` and ``removed``, and no
    key is in both of those."""

    cleared: bool = False
    stored: dict[int, None] = field(default_factory=dict)  # keys, in order
    removed: dict[int, None] = field(default_factory=dict)

    def store(self, key: int) -> None:
        if key in self.removed:
            del self.removed[key]
        else:
            self.stored[key] = None

    def remove(self, key: int) -> None:
        if key in self.stored:
            del self.stored[key]
        else:
            self.removed[key] = None

    def clear(self) -> None:
        self.cleared = True
        self.stored.clear()
        self.removed.clear()

    def __bool__(self) -> bool:
        return bool(self.cleared or self.stored or self.removed)


class Normaliser:
    """State of one engine's device cache.

    ``block_size`` is in tokens. ``seed_for`` gives the seed of a chain from the adapter's name ("":
    the base model). Invariant: a key is cached as long as one engine hash with that key has a count
    above 0.
    """

    def __init__(self, block_size: int, seed_for: Callable[[str], int]) -> None:
        self._block_size = block_size
        self._seed_for = seed_for
        self._keys: dict[Hash, int] = {}  # engine hash -> key
        self._counts: dict[Hash, int] = {}  # engine hash -> times held; chained and orphans
        self._names: dict[int, int] = {}  # key -> engine hashes that have it
        self._orphans: set[Hash] = set()  # held, but with a parent that was never announced
        self._group: int | None = None  # the first that is said to be of full attention
        self._missed = False  # events are lost since the cache was last known empty
        self._gap = False  # events are missing at the moment, and being asked for
        self.unchained = 0  # blocks that could not be given a key
        self.ignored = 0  # blocks in other tiers or other cache groups
        self.problem = ""  # why events can't be used at all; "" if they can

    @property
    def exact(self) -> bool:
        """Everything the engine caches has its key, and nothing else has."""
        return not (self._orphans or self._missed or self._gap or self.problem)

    @property
    def why_not_exact(self) -> str:
        """In words; "" if exact."""
        if self.problem:
            return self.problem
        if self._missed:
            return "some of the engine's events are lost"
        if self._gap:
            return "some of the engine's events are missing, and asked for"
        if self._orphans:
            return f"{len(self._orphans)} cached blocks follow blocks that were never announced"
        return ""

    def cached(self) -> set[int]:
        """All keys cached at the moment."""
        return set(self._names)

    def apply(self, item: Item) -> Changes:
        """Take in what the source gave; return what changed."""
        changes = Changes()
        self._gap = isinstance(item, Gap)
        if isinstance(item, Restarted):
            self._clear(changes)
        elif isinstance(item, Missed):
            # Removals may be among the lost: a key too many misleads, a key too few costs little.
            self._clear(changes)
            self._missed = True
        elif not isinstance(item, Caught | Gap):
            for event in item.events:
                if isinstance(event, BlockStored):
                    self._store(event, changes)
                elif isinstance(event, BlockRemoved):
                    self._remove(event, changes)
                elif isinstance(event, AllBlocksCleared):
                    self._clear(changes)
        return changes

    def _clear(self, changes: Changes) -> None:
        self._keys.clear()
        self._counts.clear()
        self._names.clear()
        self._orphans.clear()
        self._missed = False
        changes.clear()

    def _is_ours(self, medium: str, group: int) -> bool:
        """On the device, and of the group in which whole prefixes are cached."""
        return medium.upper() == "GPU" and group == (self._group or 0)

    def _store(self, event: BlockStored, changes: Changes) -> None:
        hashes = event.block_hashes
        if event.kind in FULL_ATTENTION and self._group is None:
            self._group = event.group
        if (event.kind is not None and event.kind not in FULL_ATTENTION) or not self._is_ours(
            event.medium, event.group
        ):
            self.ignored += len(hashes)
            return
        if event.block_size != self._block_size:
            self.problem = (
                f"the engine's events have {event.block_size} tokens a block, "
                f"{self._block_size} were expected"
            )
            self.unchained += len(hashes)
            return
        keys = self._chain(event)
        if keys is None:
            self.unchained += len(hashes)
        for position, name in enumerate(hashes):
            count = self._counts.get(name, 0)
            self._counts[name] = count + 1
            if name in self._keys:
                continue
            if keys is None:
                self._orphans.add(name)
                continue
            self._orphans.discard(name)
            key = self._keys[name] = keys[position]
            names = self._names.get(key, 0)
            self._names[key] = names + 1
            if names == 0:
                changes.store(key)

    def _chain(self, event: BlockStored) -> list[int] | None:
        """The keys of an event's blocks; ``None`` if they can't be known."""
        parent = None
        if event.parent is not None:
            parent = self._keys.get(event.parent)
            if parent is None:
                return None
        if event.lora is None and event.lora_id is not None:
            return None  # an adapter without a name: which seed it has is not said
        if len(event.token_ids) != len(event.block_hashes) * event.block_size:
            return None
        extras = [engine_extras(one, event.lora) for one in event.extra_keys or ()]
        try:
            keys: list[int] = block_keys(
                event.token_ids,
                event.block_size,
                seed=self._seed_for(event.lora or ""),
                extras=extras,
                parent=parent,
            ).tolist()
        except TypeError:
            return None  # no token ids
        return keys

    def _remove(self, event: BlockRemoved, changes: Changes) -> None:
        if not self._is_ours(event.medium, event.group):
            self.ignored += len(event.block_hashes)
            return
        for name in event.block_hashes:
            count = self._counts.get(name, 0)
            if count == 0:
                continue  # announced before we listened
            if count > 1:
                self._counts[name] = count - 1
                continue
            del self._counts[name]
            self._orphans.discard(name)
            key = self._keys.pop(name, None)
            if key is None:
                continue
            names = self._names[key] - 1
            if names:
                self._names[key] = names
            else:
                del self._names[key]
                changes.remove(key)
