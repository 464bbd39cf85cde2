"""The picker as a process serves it: pool, tokenizers, metrics and picker put together.

`dynamo frontend` runs one beside Envoy. What is decided is elsewhere; here is only what is
connected to what, and in which order it starts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
from aiohttp import web
from dynamo_kv_router.choice import Policy
from dynamo_runtime import tracing
from dynamo_runtime.discovery import (
    Endpoint,
    EndpointSource,
    FileEndpointSource,
    InferencePoolSource,
    KubernetesEndpointSource,
    PoolSpec,
    selected_pods,
)
from dynamo_runtime.kubernetes import labels
from dynamo_runtime.kubernetes.access import NoCluster, PodAccess
from dynamo_runtime.kubernetes.client import KubernetesClient
from dynamo_runtime.lifecycle import Lifecycle
from prometheus_client import CollectorRegistry, Gauge

from dynamo_epp.admission.endpoints import PoolEndpoints
from dynamo_epp.admission.gate import Gate
from dynamo_epp.admission.metrics import AdmissionMetrics
from dynamo_epp.admission.settings import FlowControlSettings
from dynamo_epp.config import KvEvents, PickerConfig
from dynamo_epp.endpoints.breaker import BreakerSettings
from dynamo_epp.endpoints.circuits import Circuits
from dynamo_epp.endpoints.inbox import EventInbox, outcomes
from dynamo_epp.endpoints.pool import Follower, Pool
from dynamo_epp.endpoints.stock import StockFollower
from dynamo_epp.endpoints.streams import StreamFollower
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.events import EventPoster
from dynamo_epp.explain import Journal
from dynamo_epp.extproc import PickRequest, Refusal, Route
from dynamo_epp.metrics import PickerMetrics
from dynamo_epp.models import ModelRules
from dynamo_epp.models.watch import follow_rules
from dynamo_epp.picker import KvPicker
from dynamo_epp.pool_metrics import PoolMetrics
from dynamo_epp.problems import Told, problems
from dynamo_epp.scheduling.disagg import DisaggPolicy
from dynamo_epp.server import AccessEntry
from dynamo_epp.status_routes import add_status_routes
from dynamo_epp.tokenization import Tokenization
from dynamo_epp.tokenize import TokenizerSource, TokenizeThreads

log = logging.getLogger(__name__)

GAUGES_EVERY_S = 1.0
TELL_EVERY_S = 5.0
"""How often it is looked for problems that people should hear of."""
RULES_RETRY_S = 5.0
START_RULES_S = 5.0
"""How long a start waits for what people say of models; without it a rewritten name is a 404."""
START_TOKENIZERS_S = 10.0
"""How long a start waits for the tokenizers of those workers."""
START_WARM_S = 5.0
"""How long a start waits for the snapshots of workers that are ready already."""


class Misconfigured(Exception):
    """A setting that prevents the start; the message names it and what would be right."""


@dataclass(frozen=True, slots=True)
class PickerSettings:
    """What can be set on a picker."""

    policy: Policy = field(default_factory=Policy)
    config: PickerConfig | None = None
    """Profiles of an ``EndpointPickerConfig``, instead of ``policy``; its section ``flowControl``
    instead of what ``flow_control`` says of the same things. For one picker: it remembers."""
    flow_control: FlowControlSettings = field(default_factory=FlowControlSettings)
    breaker: BreakerSettings = field(default_factory=BreakerSettings)
    discovery_backend: str = "file"
    """Where endpoints come from. ``file`` is a JSON file that the local runner writes; all others
    are the API server: ``kubernetes`` a graph's workers, ``inference-pool`` the pods of an
    InferencePool, ``pods`` those of a label selector."""
    endpoints_file: Path | None = None
    """For the backend ``file``."""
    graph: str = ""
    """For the backend ``kubernetes``: whose workers are the endpoints."""
    graph_namespace: str = ""
    """The Kubernetes namespace of that graph; "" for this process's own."""
    pool_name: str = ""
    """For the backend ``inference-pool``."""
    pool_group: str = "inference.networking.k8s.io"
    rules_pool: str = ""
    """Of that group, the InferencePool whose objectives and rewrites hold; "" for ``pool_name``,
    if there is one. For graphs, whose workers are found without their pool."""
    pool_namespace: str = ""
    """The namespace of that pool, and of the pods of the backend ``pods``; "" for this process's
    own."""
    endpoint_selector: str = ""
    """For the backend ``pods``: a label selector as the API takes it…"""
    endpoint_target_ports: tuple[int, ...] = ()
    """…and the ports of each pod that it picks; each is an endpoint."""
    kv_events_bind: str = ""
    """A ZeroMQ address to bind, to which stock engines send their KV events by themselves; "" for
    what ``config`` says of that, if anything."""
    kv_events_topic: str = "kv@"
    """How the topics of those events begin."""
    any_path: bool = False
    """Route what can't be understood by load, instead of refusing it."""
    fallbacks: int = 3
    """Endpoints named behind the first one, for the proxy to retry on."""
    disagg: DisaggPolicy = field(default_factory=DisaggPolicy)
    """For graphs whose workers are split into prefill and decode."""
    secret: bytes | None = field(default=None, repr=False)
    """The graph's secret, which signs what decode workers may ask of prefill workers."""
    journal: int = 2000
    """Decisions kept for `dynamo explain`."""
    access_log: bool = False
    """Write a line for each request that ended, to the logger ``access``."""
    relays: bool = False
    """Answers pass through the picker, and no access log of a proxy tells how they ended."""
    tokenizer_cache: Path | None = None
    """Folder that keeps fetched tokenizer files across restarts."""
    replica: str = ""
    """Unique name of this picker; the pod's name and a random part by default."""

    @property
    def ruled_pool(self) -> str:
        """The InferencePool whose objectives and rewrites hold; "" for none."""
        return self.rules_pool or self.pool_name


def flow_control(settings: PickerSettings) -> FlowControlSettings:
    """What holds: the file where it speaks of flow control, and for the rest the settings."""
    given, file = settings.flow_control, settings.config
    if file is None or file.flow_control is None:
        return given
    return replace(
        file.flow_control,
        limits=given.limits,
        identity=given.identity,
        models=given.models,
        demand_s=given.demand_s,
    )


def kv_events(settings: PickerSettings) -> KvEvents | None:
    """Where engines bring their KV events: what the settings say, or else the file."""
    if settings.kv_events_bind:
        return KvEvents(settings.kv_events_bind, settings.kv_events_topic)
    return settings.config.kv_events if settings.config else None


OnProblem = Callable[[str], None]
"""Told why endpoints can't be asked for at the moment, and "" when they can be again."""


def endpoint_source(
    settings: PickerSettings,
    on_problem: OnProblem = lambda problem: None,
    on_absent: OnProblem = lambda reason: None,
) -> EndpointSource:
    """The source that the settings name. ``on_absent`` is told why there is no InferencePool, and
    "" when there is one again. Raises ``Misconfigured``."""
    match settings.discovery_backend:
        case "file":
            return _file_source(settings)
        case "kubernetes" | "inference-pool" | "pods":
            return _kubernetes_source(settings, on_problem, on_absent)
    raise Misconfigured(
        f"discovery backend {settings.discovery_backend!r} is not available; "
        "use DYN_DISCOVERY_BACKEND=kubernetes in a cluster, or file with DYN_ENDPOINTS_FILE"
    )


def _file_source(settings: PickerSettings) -> EndpointSource:
    if settings.endpoints_file is None:
        raise Misconfigured(
            "no endpoints: set --endpoints-file or DYN_ENDPOINTS_FILE to a JSON file "
            '{"endpoints": [{"name", "address", "port", "ready", …}]}'
        )
    if not settings.endpoints_file.parent.is_dir():
        raise Misconfigured(f"endpoints file: {settings.endpoints_file.parent} is no folder")
    return FileEndpointSource(settings.endpoints_file)


def _kubernetes_source(
    settings: PickerSettings, on_problem: OnProblem, on_absent: OnProblem
) -> EndpointSource:
    backend = settings.discovery_backend
    if backend == "kubernetes" and not settings.graph:
        raise Misconfigured(
            "no graph: discovery backend kubernetes needs DYN_PARENT_DGD_K8S_NAME, the name of the "
            "DynamoGraphDeployment whose workers to use"
        )
    if backend == "inference-pool" and not settings.pool_name:
        raise Misconfigured("no pool: --pool-name must be the name of an InferencePool")
    if backend == "pods" and not (settings.endpoint_selector and settings.endpoint_target_ports):
        raise Misconfigured("--endpoint-selector and --endpoint-target-ports need each other")
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
        try:
            PodAccess(os.environ)
        except NoCluster as error:
            raise Misconfigured(f"discovery backend {backend}: {error}") from error
    return _ClusterEndpoints(settings, on_problem, on_absent)


class _ClusterEndpoints:
    """Pods as endpoints, with a client that lives as long as its snapshots are wanted."""

    def __init__(
        self, settings: PickerSettings, on_problem: OnProblem, on_absent: OnProblem
    ) -> None:
        self._settings = settings
        self._on_problem = on_problem
        self._on_absent = on_absent
        self._lost = False  # nothing said where the API server is

    async def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        try:
            client = await KubernetesClient.from_environment(user_agent="dynamo-picker")
        except NoCluster as error:
            self._lost = True
            self._on_problem(str(error))
            return  # whoever iterates asks again
        if self._lost:
            self._lost = False
            self._on_problem("")
        async with client, aclosing(self._source(client).snapshots()) as snapshots:
            async for snapshot in snapshots:
                yield snapshot

    def _source(self, client: KubernetesClient) -> KubernetesEndpointSource | InferencePoolSource:
        settings, told = self._settings, self._on_problem
        if settings.discovery_backend == "kubernetes":
            return KubernetesEndpointSource(
                client,
                settings.graph_namespace or client.namespace,
                labels.workers_of(settings.graph),
                on_problem=told,
            )
        namespace = settings.pool_namespace or client.namespace
        if settings.discovery_backend == "pods":
            return selected_pods(
                client,
                namespace,
                settings.endpoint_selector,
                settings.endpoint_target_ports,
                on_problem=told,
            )
        return InferencePoolSource(
            client,
            namespace,
            settings.pool_name,
            group=settings.pool_group,
            on_problem=told,
            on_absent=self._on_absent,
            on_pool=_tell_of_pool,
        )


def _tell_of_pool(spec: PoolSpec) -> None:
    log.info(
        "pods with %s, ports %s, protocol %s; without this picker the Gateway %s",
        spec.selector,
        ", ".join(map(str, spec.ports)),
        spec.app_protocol,
        "sends requests anywhere" if spec.failure_mode == "FailOpen" else "refuses requests",
    )


def replica_name(pod: str) -> str:
    """A name that no other picker process has, safe in headers and topics."""
    return f"{re.sub('[^A-Za-z0-9.-]', '-', pod)[-40:] or 'picker'}-{secrets.token_hex(3)}"


class ServingKvPicker:
    """Implements ``frontend.ServingPicker`` with a ``KvPicker``."""

    def __init__(
        self, settings: PickerSettings, lifecycle: Lifecycle, registry: CollectorRegistry
    ) -> None:
        self._metrics = PickerMetrics(registry)
        self._pool_metrics = PoolMetrics(
            registry, settings.pool_name or settings.graph or "default"
        )
        self._journal = Journal(settings.journal)
        self._lifecycle = lifecycle
        self._loop = asyncio.get_running_loop()
        self._replica = settings.replica or replica_name(os.environ.get("POD_NAME", ""))
        self._session = aiohttp.ClientSession()
        self._threads = TokenizeThreads()
        self._tokenization = Tokenization(
            self._session,
            self._threads,
            TokenizerSource(self._session, self._threads, folder=settings.tokenizer_cache),
            self._metrics,
        )
        self._publish: Callable[[Sequence[Endpoint]], None] = lambda _: None
        self._discovery = Gauge(
            "dynamo_epp_discovery_current",
            "1 while whatever knows the endpoints answers; 0 while the last list stays in force.",
            registry=registry,
        )
        self._discovery.set(1)
        self._pool_found = Gauge(
            "dynamo_epp_pool_found",
            "0 while the InferencePool of this picker does not exist or can't be understood.",
            registry=registry,
        )
        self._pool_found.set(1)
        self.absent = ""
        """Why there is no InferencePool to serve at the moment; "" if there is one."""
        self._started = False
        self._rules_known = asyncio.Event()
        self._settings = settings
        self._pool = Pool(
            endpoint_source(settings, self._on_discovery_problem, self._on_absent),
            self._follow,
            lambda snapshot: self._publish(snapshot),
        )
        counter, events = outcomes(registry), kv_events(settings)
        self._inbox = EventInbox(*events, self._pool, counter) if events else None
        self._tracing = tracing.start("dynamo-picker", os.environ, registry)
        self._circuits = Circuits(
            settings.breaker,
            self._pool.workers.values,
            random.Random(),
            lambda cause: self._metrics.circuit_openings.labels(cause).inc(),
        )
        self._gate = Gate(
            flow_control(settings),
            PoolEndpoints(self._pool, lambda: self._circuits.apply(time.monotonic())),
            AdmissionMetrics(registry),
            clock=time.monotonic,
        )
        self._picker = KvPicker(
            self._pool,
            self._tokenization,
            settings.policy,
            self._metrics,
            self._journal,
            replica=self._replica,
            rng=random.Random(),
            clock=time.monotonic,
            wall=time.time,
            any_path=settings.any_path,
            fallbacks=settings.fallbacks,
            access_log=settings.access_log,
            relays=settings.relays,
            tracing=self._tracing,
            gate=self._gate,
            circuits=self._circuits,
            scheduler=settings.config.scheduler if settings.config else None,
            disagg=settings.disagg,
            secret=settings.secret,
        )
        for note in settings.config.notes if settings.config else ():
            log.info("configuration: %s", note)
        self._tasks: list[asyncio.Task[None]] = []

    def _on_discovery_problem(self, problem: str) -> None:
        self._discovery.set(0 if problem else 1)
        if not self._pool.synced.is_set():
            reason = "waiting for the first list of endpoints"
            self._lifecycle.set_not_ready(f"{reason}: {problem}" if problem else reason)

    def _on_absent(self, reason: str) -> None:
        self.absent = reason
        self._pool_found.set(0 if reason else 1)
        if reason:
            self._lifecycle.set_not_ready(reason)
        elif self._started:
            self._lifecycle.set_ready()

    async def _follow_rules(self) -> None:
        """Keep the rules that people set on the pool's models current."""
        settings = self._settings
        while True:
            try:
                client = await KubernetesClient.from_environment(user_agent="dynamo-picker")
                async with client:
                    await follow_rules(
                        client,
                        settings.pool_namespace or settings.graph_namespace or client.namespace,
                        settings.ruled_pool,
                        self._adopt_rules,
                        rng=random.Random(),
                        group=settings.pool_group,
                        on_known=self._rules_known.set,
                    )
            except Exception:
                log.exception("objectives and rewrites are not followed; beginning anew")
            await asyncio.sleep(RULES_RETRY_S)

    async def _wait_for_rules(self) -> None:
        self._lifecycle.set_not_ready("waiting for objectives and rewrites")
        try:
            async with asyncio.timeout(START_RULES_S):
                await self._rules_known.wait()
        except TimeoutError:
            log.warning("starting without the objectives and rewrites of the pool")

    def _adopt_rules(self, rules: ModelRules) -> None:
        self._picker.rules = rules
        self._gate.objectives = rules.priorities.get
        self._gate.named = rules.targets

    def _follow(self, pool: Pool, worker: Worker) -> Follower:
        if worker.stock:
            return StockFollower(
                pool,
                worker,
                self._session,
                inbox=self._inbox,
                on_asked=self._on_asked,
                on_pulse=self._on_pulse,
            )
        return StreamFollower(
            pool,
            worker,
            self._picker,
            session=self._session,
            subscriber=self._replica,
            clock=time.monotonic,
            on_pulse=self._on_pulse,
        )

    def _on_asked(self, worker: Worker, problem: str) -> None:
        now = time.monotonic()
        if problem and worker.endpoint.ready:  # else it is still starting
            self._circuits.failed(worker, "scrape", problem, now)
        elif not problem:
            self._circuits.succeeded(worker, "scrape", now)

    def _on_pulse(self, worker: Worker, silence: str) -> None:
        now = time.monotonic()
        if silence and worker.endpoint.ready:
            self._circuits.silent(worker, silence, now)
        elif not silence:
            self._circuits.heard(worker, now)

    # --- frontend.ServingPicker

    def add_routes(self, app: web.Application) -> None:
        add_status_routes(
            app, self._lifecycle, self._pool, self._picker, self._journal, int(time.time())
        )

    async def start(self, publish: Callable[[Sequence[Endpoint]], None]) -> None:
        self._publish = publish
        if self._inbox is not None:
            self._inbox.start()
        await self._pool.start()
        await self._pool.synced.wait()
        self._tasks = [
            asyncio.create_task(self._keep_gauges()),
            asyncio.create_task(self._drain_gate()),
        ]
        if self._settings.ruled_pool:
            self._tasks.append(asyncio.create_task(self._follow_rules()))
        if self._settings.discovery_backend != "file":
            self._tasks.append(asyncio.create_task(self._tell_people()))
        self._lifecycle.set_not_ready("waiting for the caches of workers that are ready already")
        if not await self._pool.wait_warm(START_WARM_S):
            silent = [w.name for w in self._pool.workers.values() if not w.live]
            log.warning(
                "starting without the caches of %s; decisions are approximate", ", ".join(silent)
            )
        if self._settings.ruled_pool:
            await self._wait_for_rules()
        self._lifecycle.set_not_ready("waiting for tokenizers")
        await self._tokenization.loaded(START_TOKENIZERS_S)
        self._started = True
        if self.absent:
            self._lifecycle.set_not_ready(self.absent)

    def logged(self, entry: AccessEntry) -> None:
        self._picker.on_access_log(entry)

    async def stop(self) -> None:
        self._gate.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pool.stop()
        if self._inbox is not None:
            await self._inbox.stop()
        self._tokenization.stop()
        self._threads.close()
        await self._session.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def pick(self, request: PickRequest) -> Route | Refusal:
        return await self._picker.pick(request)

    def answered(self, route: Route) -> None:
        self._picker.answered(route)

    def released(self, route: Route) -> None:
        self._picker.released(route)

    async def _tell_people(self) -> None:
        """Events for what lasts."""
        settings, told = self._settings, Told()
        config = settings.config
        by_cache = config.scheduler.reads_prompt if config else settings.policy.mode == "kv"
        while True:
            try:
                client = await KubernetesClient.from_environment(user_agent="dynamo-picker")
                async with client:
                    poster = EventPoster(client, self._pool_of(client))
                    while True:
                        found = problems(
                            self._pool.workers.values(),
                            differing=self._tokenization.differing(),
                            missing=self._tokenization.missing(),
                            by_cache=by_cache,
                        )
                        for notice in told.news(found, time.monotonic()):
                            await poster.post(notice)
                        await asyncio.sleep(TELL_EVERY_S)
            except Exception:
                log.exception("events are not told; beginning anew")
            await asyncio.sleep(RULES_RETRY_S)

    def _pool_of(self, client: KubernetesClient) -> tuple[str, str, str] | None:
        """What events are about, if it is a pool."""
        settings = self._settings
        if settings.discovery_backend != "inference-pool":
            return None
        namespace = settings.pool_namespace or client.namespace
        return namespace, settings.pool_group, settings.pool_name

    async def _drain_gate(self) -> None:
        await self._lifecycle.stop_requested.wait()
        self._gate.drain()

    async def _keep_gauges(self) -> None:
        metrics = self._metrics
        while True:
            states = dict.fromkeys(metrics.WORKER_STATES, 0)
            now, unknown = time.monotonic(), 0
            for worker in self._pool.workers.values():
                states[worker.state()] += 1
                unknown += worker.endpoint.ready and not worker.load.told_lately(now)
            metrics.without_figures.set(unknown)
            for state, count in states.items():
                metrics.workers.labels(state).set(count)
            blocks = sum(map(self._pool.cached_blocks, self._pool.workers.values()))
            metrics.cached_blocks.set(blocks)
            self._pool_metrics.observe(self._pool.workers.values())
            circuits = self._circuits.states(now)
            for state in metrics.CIRCUIT_STATES:
                metrics.circuits.labels(state).set(circuits[state])
            self._gate.learn()
            self._gate.show_lanes()
            self._tokenization.keep_up(self._pool.workers.values())
            await asyncio.sleep(GAUGES_EVERY_S)
