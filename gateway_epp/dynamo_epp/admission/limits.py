"""Rate limits per tenant, in requests and in tokens.

Token buckets in debt: a request passes while its bucket is not empty and takes what it is expected
to cost, below zero if need be. So a request larger than the bucket passes too, and is paid for
by waiting longer afterwards. When the worker tells what was really used, the difference is given
back or taken.

Every picker enforces its share, the limit divided by the number of live pickers: no state is
shared, and a tenant whose requests all go through one picker gets that share only.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from dynamo_epp.admission.settings import RateLimit, RateLimits

REMEMBERED = 10_000
"""Tenants whose buckets are kept; those that were used the longest ago are forgotten first, and a
forgotten bucket is a full one."""


@dataclass(slots=True)
class TokenBucket:
    """``level`` units at time ``at``; rates come with each call, as they change with the number of
    pickers."""

    level: float
    at: float

    def refill(self, rate: float, capacity: float, now: float) -> None:
        self.level = min(capacity, self.level + rate * max(0.0, now - self.at))
        self.at = now

    def wait_s(self, rate: float) -> float:
        """Seconds until something may be taken; 0: now."""
        return 0.0 if self.level > 0 else max(-self.level / rate, 1e-3)


@dataclass(slots=True)
class _Buckets:
    requests: TokenBucket
    tokens: TokenBucket


@dataclass(slots=True)
class Charge:
    """What a request was taken to cost; settled once."""

    tenant: str
    tokens: float
    open: bool = True


class RateLimiter:
    """The buckets of all tenants. Pure: every call brings the time."""

    def __init__(self, limits: RateLimits) -> None:
        self._limits = limits
        self._buckets: OrderedDict[str, _Buckets] = OrderedDict()

    @property
    def idle(self) -> bool:
        """Nobody has a limit."""
        return not self._limits.tenants and not _limited(self._limits.default)

    def take(self, tenant: str, tokens: float, pickers: int, now: float) -> Charge | float:
        """Charge a request of ``tokens`` expected tokens, or tell the seconds until it may come
        again. ``pickers`` share the limit."""
        limit = self._limits.of(tenant)
        if not _limited(limit):
            return Charge(tenant, tokens, open=False)
        share = 1.0 / (self._limits.replicas or max(1, pickers))
        buckets = self._refilled(tenant, limit, share, now)
        wait_s = 0.0
        if limit.requests_per_s:
            wait_s = buckets.requests.wait_s(limit.requests_per_s * share)
        if limit.tokens_per_s:
            wait_s = max(wait_s, buckets.tokens.wait_s(limit.tokens_per_s * share))
        if wait_s:
            return wait_s
        buckets.requests.level -= 1
        buckets.tokens.level -= tokens
        return Charge(tenant, tokens)

    def settle(self, charge: Charge, tokens: float) -> None:
        """The request really used ``tokens``."""
        buckets = self._close(charge)
        if buckets is not None:
            buckets.tokens.level += charge.tokens - tokens

    def refund(self, charge: Charge) -> None:
        """The request was not served."""
        buckets = self._close(charge)
        if buckets is not None:
            buckets.tokens.level += charge.tokens
            buckets.requests.level += 1

    def _close(self, charge: Charge) -> _Buckets | None:
        if not charge.open:
            return None
        charge.open = False
        return self._buckets.get(charge.tenant)

    def _refilled(self, tenant: str, limit: RateLimit, share: float, now: float) -> _Buckets:
        # At least one request, or a low rate would let nobody pass.
        burst_requests = max(1.0, limit.requests_per_s * share * limit.burst_s)
        burst_tokens = limit.tokens_per_s * share * limit.burst_s
        buckets = self._buckets.get(tenant)
        if buckets is None:
            buckets = _Buckets(TokenBucket(burst_requests, now), TokenBucket(burst_tokens, now))
            self._buckets[tenant] = buckets
            if len(self._buckets) > REMEMBERED:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(tenant)
        buckets.requests.refill(limit.requests_per_s * share, burst_requests, now)
        buckets.tokens.refill(limit.tokens_per_s * share, burst_tokens, now)
        return buckets


def _limited(limit: RateLimit) -> bool:
    return limit.requests_per_s > 0 or limit.tokens_per_s > 0
