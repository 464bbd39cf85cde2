"""Bookings: what ties a pick to what workers and proxy say of it later.

A booking is open while the request's stream is. Where a worker of ours has the request, it is kept
until that worker told how it ended, or nobody will tell any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from dynamo_epp.admission.gate import Admitted
from dynamo_epp.endpoints.worker import Rank, Worker
from dynamo_epp.explain import Entry
from dynamo_epp.requests import Kind

BOOKING_HEADER = "x-dynamo-booking"
LATE_S = 5.0
"""How long after a stream's end the worker's own account of the request is waited for."""


@dataclass(slots=True, eq=False)
class Booking:
    """A pick between its answer and the end of its stream."""

    key: str
    kind: Kind
    worker: Worker
    entry: Entry
    picked_at: float  # monotonic seconds
    prompt_tokens: int  # as they count for load
    open: bool = True  # the stream has not ended
    admitted: Admitted | None = None  # how it came in
    prefill: Booking | None = None  # its other half, in a prefill worker
    half: bool = False  # it is such a half
    rank: Rank | None = None  # where it was sent to, if the engine was not left to choose
    status: int = 0  # of the answer, by the worker's last word; 0: not told
    untold: bool = False  # the stream has ended and did not tell how


class Bookings:
    """Those that somebody may still tell of, by key. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._kept: dict[str, Booking] = {}  # until the stream and the request both ended
        self._late: deque[tuple[float, Booking]] = deque()  # ended streams, the oldest first

    def add(self, booking: Booking) -> None:
        self._kept[booking.key] = booking

    def get(self, key: str) -> Booking | None:
        return self._kept.get(key)

    def pop(self, key: str) -> Booking | None:
        """The worker's last word of it has come."""
        return self._kept.pop(key, None)

    def close(self, booking: Booking, now: float) -> bool:
        """The stream has ended. Whether nobody will tell any more of this booking."""
        booking.open = False
        booking.worker.load.release(booking.key)
        if booking.rank is not None:
            booking.rank.booked -= 1
        if booking.worker.stock:
            self._kept.pop(booking.key, None)
        elif booking.key in self._kept:
            # Short requests end before their worker's word of them is here.
            self._late.append((now, booking))
            return False
        return True

    def overdue(self, now: float) -> Iterator[Booking]:
        """Those whose stream ended ``LATE_S`` ago, that no worker told of; they are forgotten."""
        while self._late and now - self._late[0][0] >= LATE_S:
            _, booking = self._late.popleft()
            running = booking.key in booking.worker.load.accepted
            if not running and self._kept.pop(booking.key, None) is not None:
                yield booking

    def unseen(self, worker: Worker) -> Iterator[Booking]:
        """Those whose stream has ended and that ``worker`` does not have in hand; it will not tell
        how they ended, and they are forgotten."""
        for key, booking in list(self._kept.items()):
            if booking.worker is worker and not booking.open and key not in worker.load.accepted:
                del self._kept[key]
                yield booking

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)
