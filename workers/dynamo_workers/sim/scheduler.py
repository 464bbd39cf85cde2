"""Continuous batching with chunked prefill, as a discrete model without a clock or I/O.

One turn is `schedule` (what runs in the next step, and how long it takes) and, that much later,
`complete` (which sequences have a token more). Time is an argument, so the model can be driven by
a real clock, faster than real, or by a test.

The rules are vLLM's: a step has a budget of tokens; running sequences come first, in order of
admission; waiting ones follow, first come first served, while the budget, the batch size and the
blocks allow it, and only when the blocks of the whole prompt fit; those whose LoRA adapter does not
fit into the batch are passed over. A running sequence that gets no block takes them from the
youngest one, which then starts again from what is still cached. A sequence's last prompt token is
always computed, also when all of it is cached.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from dynamo_runtime.timing_profile import TimingProfile

from dynamo_workers.sim.adapters import Adapter
from dynamo_workers.sim.blocks import BlockPool, block_hash


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine can hold and run at a time."""

    block_size: int = 16
    """Tokens in a block."""
    total_blocks: int = 4096
    """Blocks of the pool, the reserved one included."""
    max_num_seqs: int = 256
    """Sequences in one step."""
    max_num_batched_tokens: int = 8192
    """Tokens computed in one step; longer prompts are computed in chunks."""
    max_model_len: int = 32768
    """Prompt and answer of one sequence together, in tokens."""
    prefix_caching: bool = True
    max_loras: int = 0
    """LoRA adapters in one step; 0: there are none."""

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        needed = -(-self.max_model_len // self.block_size)
        if self.total_blocks - 1 < needed:
            raise ValueError(
                f"a sequence of max_model_len {self.max_model_len} needs {needed} blocks of "
                f"{self.block_size} tokens, but the pool has {self.total_blocks} (one is reserved);"
                " use more blocks or a smaller max_model_len"
            )


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the answer it will get, on its way through the engine."""

    prompt: list[int]
    answer: list[int]
    """The tokens that will be produced; empty where only the prompt is computed (embeddings)."""
    finish_reason: str = "stop"
    """Why the answer ends where it does: "stop" or "length"."""
    max_tokens: int = 0
    """The limit that the client set, for the metrics."""
    salt: str | None = None
    adapter: Adapter | None = None
    external: int = 0
    """Leading prompt tokens whose KV another engine gives."""
    keep_as: str = ""
    """The request's id, where its blocks are to stay when it ends: see `release_kept`."""
    on_progress: Callable[[], None] | None = None
    """Called by the driver after a step in which this sequence got a token or ended."""

    produced: int = 0
    computed: int = 0  # tokens whose KV is in the blocks
    cached_tokens: int = -1  # found in the cache when first admitted; -1 before that
    external_tokens: int = 0  # beyond those, taken from another engine
    transfer_params: dict[str, Any] | None = None  # what leads another engine to its blocks
    preemptions: int = 0
    finished: bool = False
    aborted: bool = False
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of full blocks, as far as computed
    stored: int = 0  # leading blocks that are in the cache
    arrived_at: float = 0.0
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    previous_token_at: float = 0.0

    @property
    def length(self) -> int:
        return len(self.prompt) + self.produced

    def tokens(self, start: int, end: int) -> list[int]:
        """Prompt and answer as one list, from `start` to before `end`."""
        cut = len(self.prompt)
        if end <= cut:
            return self.prompt[start:end]
        return self.prompt[start:] + self.answer[max(0, start - cut) : end - cut]


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the model over a batch."""

    seconds: float
    work: tuple[tuple[Sequence, int], ...]  # sequence and how many of its tokens are computed
    prefill_tokens: int
    decoding: int


class Scheduler:
    """The state of one engine: who runs, who waits, and the block pool."""

    def __init__(self, limits: Limits, profile: TimingProfile, none: bytes) -> None:
        self.limits = limits
        self.profile = profile
        self.pool = BlockPool(limits.total_blocks, caching=limits.prefix_caching)
        self.running: list[Sequence] = []  # in order of admission
        self.waiting: deque[Sequence] = deque()
        self.prefix_queries = 0  # tokens looked up in the cache since the start
        self.prefix_hits = 0  # of these, tokens found
        self.preemptions = 0
        self._none = none

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, sequence: Sequence, now: float) -> None:
        """Puts a sequence at the end of the queue; its length must be within max_model_len."""
        total = len(sequence.prompt) + len(sequence.answer)
        if not sequence.prompt or total > self.limits.max_model_len:
            raise ValueError(
                f"a sequence has 1 to {self.limits.max_model_len} tokens, this one {total}"
                f" (prompt {len(sequence.prompt)})"
            )
        sequence.arrived_at = now
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it is and frees its blocks; nothing if it has ended."""
        if sequence.finished:
            return
        sequence.finished = sequence.aborted = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def release_kept(self, sequence: Sequence) -> None:
        """Frees the blocks of a sequence that ended with `keep_as`."""
        self._release(sequence)

    def schedule(self, now: float) -> Step | None:
        """The next step, or None if nothing runs or waits."""
        budget = self.limits.max_num_batched_tokens
        work: list[tuple[Sequence, int]] = []
        prefill = decoding = 0
        preempted = False

        position = 0
        while position < len(self.running) and budget > 0:
            sequence = self.running[position]
            count = min(sequence.length - sequence.computed, budget)
            while not self._allocate(sequence, count):
                victim = self.running.pop()
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            else:
                if sequence.produced and sequence.computed == sequence.length - 1:
                    decoding += 1
                else:
                    prefill += count
                work.append((sequence, count))
                budget -= count
                position += 1
                continue
            break

        passed_over: list[Sequence] = []
        while self.waiting and budget > 0 and not preempted:
            if len(self.running) >= self.limits.max_num_seqs:
                break
            sequence = self.waiting[0]
            if sequence.adapter is not None and not self._adapter_fits(sequence.adapter):
                passed_over.append(self.waiting.popleft())
                continue
            count = self._admit(sequence, budget, now)
            if count == 0:
                break
            self.waiting.popleft()
            self.running.append(sequence)
            work.append((sequence, count))
            prefill += count
            budget -= count
        self.waiting.extendleft(reversed(passed_over))

        if not work:
            return None
        seconds = self.profile.prefill_seconds(prefill)
        seconds += self.profile.decode_step_seconds(decoding)
        return Step(seconds, tuple(work), prefill, decoding)

    def complete(self, step: Step, now: float) -> list[Sequence]:
        """Ends a step; returns the sequences that got a token or ended, in batch order."""
        progressed = []
        for sequence, count in step.work:
            if sequence.finished:  # aborted while the step ran
                continue
            sequence.computed += count
            if sequence.computed < sequence.length:
                continue
            if sequence.answer:
                sequence.produced += 1
                if sequence.produced == 1:
                    sequence.first_token_at = now
            sequence.previous_token_at, sequence.last_token_at = sequence.last_token_at, now
            if sequence.produced == len(sequence.answer):
                sequence.finished = True
                if not sequence.keep_as:
                    self._release(sequence)
            progressed.append(sequence)
        if any(sequence.finished for sequence in progressed):
            self.running = [sequence for sequence in self.running if not sequence.finished]
        return progressed

    def _adapter_fits(self, adapter: Adapter) -> bool:
        """Whether a sequence with it may run beside those that run."""
        used = adapters_of(self.running)
        return adapter in used or len(used) < self.limits.max_loras

    def _admit(self, sequence: Sequence, budget: int, now: float) -> int:
        """Gives a waiting sequence its first blocks; returns tokens to compute, 0 if no room."""
        size = self.limits.block_size
        found: list[int] = []
        if self.limits.prefix_caching:
            self._hash_up_to(sequence, sequence.length // size)
            usable = (sequence.length - 1) // size  # the last token is computed in any case
            found = self.pool.find(islice(sequence.hashes, usable))
        needed = -(-sequence.length // size) - len(found)
        if needed + self.pool.free_among(found) > self.pool.free_count:
            return 0
        self.pool.hold(found)
        sequence.blocks = found
        sequence.stored = len(found)
        sequence.computed = len(found) * size
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed
            sequence.admitted_at = now
            if self.limits.prefix_caching:
                self.prefix_queries += sequence.length
                self.prefix_hits += sequence.computed
            given = min(sequence.external, sequence.length - 1) - sequence.computed
            if given > 0:
                self._allocate(sequence, given)  # there is room: see above
                sequence.computed += given
                sequence.external_tokens = given
        count = min(sequence.length - sequence.computed, budget)
        self._allocate(sequence, count)
        return count

    def _allocate(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` tokens more; caches those that they fill. False if there are none."""
        size = self.limits.block_size
        end = sequence.computed + count
        missing = -(-end // size) - len(sequence.blocks)
        if missing > 0:
            if missing > self.pool.free_count:
                return False
            sequence.blocks += self.pool.take(missing)
        full = end // size
        if full > sequence.stored and self.limits.prefix_caching:
            self._hash_up_to(sequence, full)
            first = sequence.stored
            self.pool.store(
                sequence.blocks[first:full],
                sequence.hashes[first:full],
                sequence.hashes[first - 1] if first else None,
                sequence.tokens(first * size, full * size),
                sequence.salt,
                sequence.adapter,
            )
            sequence.stored = full
        return True

    def _hash_up_to(self, sequence: Sequence, full: int) -> None:
        size = self.limits.block_size
        for index in range(len(sequence.hashes), full):
            sequence.hashes.append(
                block_hash(
                    sequence.hashes[-1] if index else self._none,
                    sequence.tokens(index * size, (index + 1) * size),
                    sequence.salt if index == 0 else None,
                    sequence.adapter,
                )
            )

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.stored = sequence.computed = 0


def adapters_of(sequences: Iterable[Sequence]) -> dict[Adapter, None]:
    """The LoRA adapters of some sequences, each once, in their order."""
    return {each.adapter: None for each in sequences if each.adapter is not None}
