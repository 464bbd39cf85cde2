"""One engine as the picker sees it.

Registry, worker stream and scrapes each know a part; this is where the parts meet. Nothing here
does I/O: followers call in what they learned, and the scheduler reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamo_kv_router.load import WorkerLoad
from dynamo_runtime.endpoint import Endpoint

from dynamo_epp.endpoints.breaker import Breaker


@dataclass(slots=True, eq=False)
class Rank:
    """A data-parallel rank of an engine whose ranks are behind one port."""

    number: int
    slot: int  # of its cache in the prefix index
    reported: int = 0  # requests that run or wait there, by the engine's metrics
    booked: int = 0  # of this picker's, those that were sent there and have not ended

    @property
    def requests(self) -> int:
        """In hand: the metrics are late, and this picker knows of its own requests only."""
        return max(self.reported, self.booked)


@dataclass(slots=True, eq=False)
class Worker:
    """State of one engine. ``slot`` is its small integer in the prefix index."""

    endpoint: Endpoint
    slot: int
    load: WorkerLoad
    model: str = ""
    """Its base model's served name; "" until it told."""
    models: frozenset[str] = frozenset()
    """Every name it answers to: the model, its aliases and its LoRA adapters."""
    loras: frozenset[str] = frozenset()
    """Those of ``models`` that are LoRA adapters."""
    block_size: int = 0
    """Tokens a block; 0 until known."""
    live: bool = False
    """What the index holds of it is current."""
    tracked: bool = True
    """Events of its cache come at all; false for an engine that publishes none."""
    exact: bool = False
    """What the index holds of it is all that it caches."""
    problem: str = "not heard of yet"
    """Why it is not ``live`` or not ``exact``; "" if it is both."""
    load_problem: str = ""
    """Why its load figures can't be had at the moment; "" if they can. They grow old then."""
    tokenizer: str = ""
    """Name of its tokenizer in the tokenizer shelf; "" if the engine itself must be asked."""
    total_blocks: int = 0
    max_model_len: int = 0
    ranks: tuple[Rank, ...] = ()
    """Its data-parallel ranks, each with a cache of its own; empty if it has one cache."""
    breaker: Breaker = field(default_factory=Breaker)
    circuit: str = ""
    """Why its circuit keeps requests from it at the moment, or ""; kept by ``Circuits``."""
    hostport: str = field(init=False)
    """``ip:port``, as candidates and headers need it for each request."""

    def __post_init__(self) -> None:
        self.hostport = self.endpoint.hostport

    @property
    def name(self) -> str:
        return self.endpoint.name

    @property
    def slots(self) -> tuple[int, ...]:
        """Where the index has its caches."""
        return (self.slot, *(rank.slot for rank in self.ranks))

    def rank(self, number: int) -> Rank | None:
        return next((rank for rank in self.ranks if rank.number == number), None)

    @property
    def stock(self) -> bool:
        """No launcher of ours stands beside the engine."""
        return self.endpoint.stream_port is None

    def chain(self, model: str) -> tuple[str, str, int]:
        """What names the chain of block keys of a request for ``model`` here.

        (base model, LoRA adapter or "", tokens a block).
        """
        return self.model, model if model in self.loras else "", self.block_size

    def state(self) -> str:
        """One word for metrics and tables."""
        if self.endpoint.terminating:
            return "terminating"
        if self.load.draining:
            return "draining"
        if not self.endpoint.ready:
            return "not-ready"
        if not self.live:
            return "cache-unknown"
        return "exact" if self.exact else "approximate"
