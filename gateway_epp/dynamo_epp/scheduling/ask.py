"""One request, as filters and scorers see it: plain data, made once for each pick."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from dynamo_kv_router.choice import Candidate, RequestSize
from msgspec.structs import replace

from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.scheduling.approximate import ApproximatePrefixes

Tokens = npt.NDArray[np.uint32]


@dataclass(slots=True, eq=False)
class Ask:
    """A request for ``model`` at ``now`` (monotonic seconds)."""

    model: str
    size: RequestSize
    now: float
    workers: Mapping[str, Worker]  # by the candidates' names
    headers: Mapping[str, str] = field(default_factory=dict)  # lower-case names
    tokens: Tokens | None = None  # of the prompt; None if they are not known
    content: Callable[[], bytes] = bytes  # what the prompt is made of, where tokens are not known
    extras: Sequence[bytes] = ()  # what else its cached blocks depend on: see ``block_extras``
    peer: Worker | None = None  # whom the other half of a divided request goes to
    profile: str = ""  # the profile that runs; it fills in this and the next
    prefixes: Prefixes | None = None

    def worker(self, candidate: Candidate) -> Worker:
        return self.workers[candidate.name]

    def labels(self, candidate: Candidate) -> Mapping[str, str]:
        """The pod's labels."""
        return self.workers[candidate.name].endpoint.labels

    def cached(self) -> Prefixes:
        """What the candidates cache of the prompt."""
        assert self.prefixes is not None
        self.prefixes.asked = True
        return self.prefixes


class Prefixes:
    """How much of the prompt each candidate caches, by the best knowledge there is.

    Exact, where the prompt's tokens are known and the index follows the candidate's cache.
    Elsewhere it is an estimate: what was sent to the candidate before. ``asked`` and ``estimated``
    say afterwards how the decision came about.
    """

    __slots__ = ("_approximate", "_ask", "_depths", "_keys", "asked", "estimated")

    def __init__(self, ask: Ask, approximate: ApproximatePrefixes) -> None:
        self._ask = ask
        self._approximate = approximate
        self._keys: npt.NDArray[np.uint64] | None = None
        self._depths: dict[str, int] | None = None
        self.asked = False
        self.estimated = False

    def exact(self, candidate: Candidate) -> bool:
        return candidate.tracked and self._ask.tokens is not None

    def share(self, candidate: Candidate) -> float:
        """Of the prompt's full blocks, those that the candidate caches from the first on; 0..1."""
        size = self._ask.size
        if self.exact(candidate):
            block = self._block(candidate)
            full = size.prompt_tokens // block
            return min(1.0, candidate.overlap_blocks / full) if full else 0.0
        self.estimated = True
        keys = self.keys()
        return self._depth(candidate) / len(keys) if len(keys) else 0.0

    def tokens(self, candidate: Candidate) -> int:
        """Leading tokens of the prompt that the candidate caches."""
        if self.exact(candidate):
            return min(
                candidate.overlap_blocks * self._block(candidate), self._ask.size.prompt_tokens
            )
        self.estimated = True
        return self._depth(candidate) * self._approximate.block_tokens

    def keys(self) -> npt.NDArray[np.uint64]:
        """The prompt's keys in the approximate index, computed when first needed."""
        if self._keys is None:
            ask = self._ask
            self._keys = self._approximate.keys(
                ask.model, ask.content() if ask.tokens is None else ask.tokens, ask.extras
            )
        return self._keys

    def estimated_overlaps(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates; those whose cache nobody follows with an estimate as their overlap."""
        return [
            each
            if each.tracked or each.dropped or not self._depth(each)
            else replace(each, overlap_blocks=self.tokens(each) // self._block(each))
            for each in candidates
        ]

    def sent(self, candidate: Candidate) -> None:
        """The request goes to ``candidate``, which will cache it. Kept where that is not told."""
        if not self.exact(candidate):
            self._approximate.record(self._ask.worker(candidate), self.keys())
            self._approximate.keep(self._ask.workers)

    def _block(self, candidate: Candidate) -> int:
        return self._ask.worker(candidate).block_size or self._ask.size.block_size

    def _depth(self, candidate: Candidate) -> int:
        if self._depths is None:
            self._depths = self._approximate.match(self.keys())
        return self._depths.get(self._ask.worker(candidate).hostport, 0)
