"""Readings from a Prometheus that scrapes the workers.

Two instant queries a look, whatever the number of workers: the newest sample of every series that
is read, and when it was taken. Counters come raw, so that restarts, gaps and zero are judged by the
same rules as those of pages that were asked for directly; `increase` and `rate` would hide them.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from dynamo_runtime.discovery import Endpoint
from dynamo_runtime.kubernetes.access import tls_context

from dynamo_planner.config.model import PlannerConfig
from dynamo_planner.observe import Reading
from dynamo_planner.observe.page import NAMES, RUNNING, Figures, figures_of
from dynamo_planner.sources.endpoints import Misconfigured
from dynamo_planner.sources.workers import Workers, reading

log = logging.getLogger(__name__)


class PrometheusFailed(Exception):
    """No answer, or none that could be read; the message says why."""


class _Sample(msgspec.Struct):
    metric: dict[str, str]
    value: tuple[float, str]  # when the query was answered, and the value


class _Data(msgspec.Struct):
    result: list[_Sample] = msgspec.field(default_factory=list)


class _Answer(msgspec.Struct):
    status: str
    data: _Data = msgspec.field(default_factory=_Data)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Prometheus:
    """Where a Prometheus is, and as whom to ask it. Keys: ``metric_pulling_prometheus_…``."""

    url: str
    token: str = ""
    token_file: Path | None = None  # read before each query: tokens are replaced
    tls: ssl.SSLContext | bool = False  # what verifies its certificate; False: nothing does
    parameters: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 10.0

    @classmethod
    def of(cls, config: PlannerConfig) -> Prometheus:
        """Raises ``Misconfigured`` for files that can't be read."""
        bundle = config.metric_pulling_prometheus_ca_bundle
        try:
            tls: ssl.SSLContext | bool = (
                tls_context(bundle) if bundle else config.metric_pulling_prometheus_ssl_verify
            )
        except (OSError, ssl.SSLError) as error:
            raise Misconfigured(f"metric_pulling_prometheus_ca_bundle {bundle}: {error}") from error
        file = config.metric_pulling_prometheus_token_file
        return cls(
            url=(config.metric_pulling_prometheus_endpoint or "").rstrip("/"),
            token=config.metric_pulling_prometheus_token or "",
            token_file=Path(file) if file else None,
            tls=tls,
            parameters=config.metric_pulling_prometheus_extra_query_params or {},
            timeout_s=config.metric_pulling_prometheus_request_timeout_seconds,
        )

    def headers(self) -> dict[str, str]:
        """Raises ``PrometheusFailed`` for a token file that can't be read."""
        token = self.token
        if self.token_file is not None:
            try:
                token = self.token_file.read_text().strip()
            except OSError as error:
                raise PrometheusFailed(f"{self.token_file}: {error.strerror}") from error
        return {"Authorization": f"Bearer {token}"} if token else {}

    async def query(self, client: aiohttp.ClientSession, promql: str) -> list[_Sample]:
        """An instant query. Raises ``PrometheusFailed``."""
        url = f"{self.url}/api/v1/query"
        form = {"query": promql}
        try:
            async with client.post(
                url, data=form, params=self.parameters, headers=self.headers(), ssl=self.tls
            ) as answer:
                body = await answer.read()
        except TimeoutError as error:
            raise PrometheusFailed(f"{url}: no answer within {self.timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise PrometheusFailed(f"{url}: {error}") from error
        try:
            found = msgspec.json.decode(body, type=_Answer)
        except msgspec.DecodeError as error:
            raise PrometheusFailed(f"{url}: {answer.status}, and no JSON: {error}") from error
        if found.status != "success":
            raise PrometheusFailed(f"{url}: {answer.status} {found.error}")
        return found.data.result


@dataclass(frozen=True, slots=True)
class _Known:
    figures: Figures
    at: float  # when the samples were taken, by the planner's clock


class PrometheusSource:
    """Readings of ``workers`` from ``prometheus``. ``namespace`` narrows the queries; "": all."""

    def __init__(
        self,
        workers: Workers,
        prometheus: Prometheus,
        *,
        namespace: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._prometheus = prometheus
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._problem = ""
        where = f',namespace="{namespace}"' if namespace else ""
        self._values = f'{{__name__=~"{"|".join(NAMES)}"{where}}}'
        self._times = f"timestamp({RUNNING}{{{where.lstrip(',')}}})"

    async def readings(self) -> tuple[Reading, ...]:
        endpoints = self._workers.endpoints
        timeout = aiohttp.ClientTimeout(total=self._prometheus.timeout_s)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as client:
                values, times = await asyncio.gather(
                    self._prometheus.query(client, self._values),
                    self._prometheus.query(client, self._times),
                )
            self._take(endpoints, values, times)
            self._tell("")
        except PrometheusFailed as error:
            self._tell(str(error))
        for gone in self._known.keys() - {endpoint.name for endpoint in endpoints}:
            del self._known[gone]
        now = self._clock()
        return tuple(
            reading(each, known.figures, now - known.at)
            if (known := self._known.get(each.name)) is not None
            else reading(each, None, None)
            for each in endpoints
        )

    def _take(
        self, endpoints: Iterable[Endpoint], values: list[_Sample], times: list[_Sample]
    ) -> None:
        now = self._clock()
        samples = _by_target(values)
        ages = {
            target: max(0.0, sample.value[0] - _number(sample.value[1]))
            for target, found in _by_target(times).items()
            for sample in found
        }
        for endpoint in endpoints:
            targets = [t for t in _targets(endpoint, samples) if t in ages]
            if not targets:
                continue
            # A worker whose launcher and engine are both scraped has its figures twice.
            target = max(targets, key=lambda t: (len(samples[t]), t))
            found = figures_of(
                (s.metric.get("__name__", ""), s.metric, _number(s.value[1]))
                for s in samples[target]
                if s.metric.get("__name__") in NAMES
            )
            if found is not None:
                self._known[endpoint.name] = _Known(found, now - ages[target])

    def _tell(self, problem: str) -> None:
        if problem and not self._problem:
            log.warning("Prometheus can't be asked: %s", problem)
        elif self._problem and not problem:
            log.info("Prometheus answers again")
        self._problem = problem


_Target = tuple[str, str]  # labels pod and instance


def _by_target(samples: Iterable[_Sample]) -> dict[_Target, list[_Sample]]:
    found: dict[_Target, list[_Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.metric.get("pod", ""), sample.metric.get("instance", "")].append(sample)
    return found


def _targets(endpoint: Endpoint, known: Mapping[_Target, Any]) -> list[_Target]:
    """The targets that are ``endpoint``: by the pod's name, or else by its address."""
    named = [target for target in known if target[0] == endpoint.name]
    if named:
        return named
    host = endpoint.hostport.rpartition(":")[0]
    addresses = {f"{host}:{port}" for port in (endpoint.port, endpoint.status_port) if port}
    return [target for target in known if not target[0] and target[1] in addresses]


def _number(text: str) -> float:
    """A value as Prometheus writes it; what is none is NaN, and so not known."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
