"""Runs a plan: makes the pods, keeps the endpoints file true, waits, scales, ends.

The endpoints file is to local pickers what the API server's watch is to a cluster's: it holds
every engine pod from the moment it exists, with its readiness, and says that a pod is going before
its processes are told.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence

from dynamo_runtime.discovery import Endpoint, write_endpoints

from dynamo_cli.local.addresses import check_ports
from dynamo_cli.local.container import Container
from dynamo_cli.local.expand import Unresolved
from dynamo_cli.local.plan import GENERATION_LABEL, Plan, PodPlan, Refusals
from dynamo_cli.local.pod import MissingProgram, Place, Pod
from dynamo_cli.local.record import PodRecord, UpRecord, started, write_record
from dynamo_cli.local.routed import until_routed
from dynamo_cli.local.scales import ScaleServer
from dynamo_cli.local.session import Session
from dynamo_cli.local.volumes import Refused, remove_tree

STREAM_PORT = "worker-stream"  # names of container ports
STATUS_PORT = "system"
ROUTED_S = 5.0  # for frontends to hear of engines that are ready


class NotReady(Exception):
    """The graph will not become ready, or not in time; the message says what is wrong."""


class Runner:
    """All pods of one run.

    ``on_line(text)`` gets what a user should read, ``on_change(pods)`` each change of state.
    """

    def __init__(
        self,
        plan: Plan,
        session: Session,
        *,
        graph: str,
        on_line: Callable[[str], None],
        on_change: Callable[[Sequence[Pod]], None],
    ) -> None:
        self.plan = plan
        self.session = session
        self.graph = graph
        self.pods: list[Pod] = []
        self.troubled = False  # a container failed at some time: its logs are worth keeping
        self._on_line = on_line
        self._on_change = on_change
        self._wanted = {pod.deployment: pod.replicas for pod in plan.pods}
        self._tasks: dict[Pod, asyncio.Task[None]] = {}
        self._made = 0
        self._tails: set[str] = set()  # that the user has seen
        self._routed = False  # the frontends have heard of the engines
        self._moved = asyncio.Event()
        self._endpoints_file = session.state / "endpoints.json"
        self._scales_socket = session.scratch / "scales"
        self._scales: ScaleServer | None = None
        self._endpoints: list[Endpoint] | None = None
        self._record: UpRecord | None = None

    # --- making and ending --------------------------------------------------------------------

    async def start(self) -> list[str]:
        """Make every pod and start it; return notes for the user.

        Raises ``Refusals`` or ``PortTaken`` before anything runs.
        """
        refusals: list[str] = []
        for plan in self.plan.pods:
            for ordinal in range(plan.replicas):
                try:
                    self.pods.append(self._make(plan, ordinal))
                except (Unresolved, Refused, MissingProgram) as error:
                    refusals.append(str(error))
                    break
        if refusals:
            raise Refusals(list(dict.fromkeys(refusals)))
        for pod in self.pods:
            check_ports(pod.address, pod.plan.ports)
        notes = [note for pod in self.pods for note in pod.notes]
        self._publish()
        if any(plan.component_type == "planner" for plan in self.plan.pods):
            self._scales = self._scale_server()
            await self._scales.start()
        for pod in self.pods:
            self._tasks[pod] = asyncio.create_task(pod.run(), name=pod.name)
        return list(dict.fromkeys(notes))

    def _scale_server(self) -> ScaleServer:
        return ScaleServer(
            self._scales_socket,
            self.plan.adapters,
            wanted=lambda deployment: self._wanted[deployment],
            ready=lambda name: sum(p.ready for p in self.pods if p.plan.deployment == name),
            scale=self.scale,
        )

    def _make(self, plan: PodPlan, ordinal: int) -> Pod:
        name = f"{plan.deployment}-{ordinal}"
        self._made += 1
        place = Place(
            name=name,
            namespace=self.plan.namespace,
            address=self.session.addresses.take(),
            scratch=self.session.scratch / str(self._made),
            logs=self.session.state / name,
            endpoints=self._endpoints_file,
            scales=self._scales_socket,
            run=self.session.id,
            tell=self.session.tell,
        )
        return Pod(plan, place, self.plan.objects, self._pod_changed)

    async def stop(self, grace_s: float | None = None) -> None:
        """End all pods at once, each within its grace period."""
        if self._scales is not None:
            await self._scales.stop()
            self._scales = None
        await asyncio.gather(*(self._end(pod, grace_s) for pod in list(self.pods)))

    async def _end(self, pod: Pod, grace_s: float | None = None) -> None:
        await pod.stop(grace_s)
        if task := self._tasks.pop(pod, None):
            await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(remove_tree, pod.place.scratch)
        if pod in self.pods:
            self.pods.remove(pod)
            self.session.addresses.give_back(pod.address)
        self._publish()

    async def scale(self, deployment: str, replicas: int) -> None:
        """Give a Deployment another number of pods; the highest ordinals go first.

        Returns when the pods that go have gone; those that come are started. Raises ``KeyError``
        for an unknown Deployment.
        """
        plan = next((p for p in self.plan.pods if p.deployment == deployment), None)
        if plan is None:
            raise KeyError(deployment)
        self._wanted[deployment] = replicas
        present = [p for p in self.pods if p.plan is plan and not p.terminating]
        taken = {pod.name for pod in self.pods if pod.plan is plan}
        ordinal = 0
        while len(present) < replicas:
            if f"{deployment}-{ordinal}" not in taken:
                pod = self._make(plan, ordinal)
                self.pods.append(pod)
                present.append(pod)
                self._tasks[pod] = asyncio.create_task(pod.run(), name=pod.name)
            ordinal += 1
        self._publish()
        going = sorted(present, key=lambda p: int(p.name.rpartition("-")[2]))[replicas:]
        await asyncio.gather(*(self._end(pod) for pod in going))

    # --- state --------------------------------------------------------------------------------

    def _pod_changed(self, pod: Pod, container: Container | None, line: str, tail: str) -> None:
        if line:
            one = len(pod.plan.containers) == 1 or container is None
            who = pod.name if one or container is None else f"{pod.name}/{container.plan.name}"
            if tail and tail in self._tails:
                line += " (log as above)"  # replicas fail alike, and again and again
            elif tail:
                self._tails.add(tail)
                line += f":\n{tail}"
            self._on_line(f"{who}: {line}")
        if container is not None and container.failures:
            self.troubled = True
        self._publish()

    def _publish(self) -> None:
        """Bring the endpoints file, the record and the view up to date."""
        endpoints = [_endpoint(pod) for pod in self.pods if pod.plan.is_engine]
        if endpoints != self._endpoints:
            write_endpoints(self._endpoints_file, endpoints)
            self._endpoints = endpoints
        record = self.record()
        if record != self._record:
            write_record(self.session.record, record)
            self._record = record
        self._on_change(self.pods)
        self._moved.set()

    @property
    def url(self) -> str:
        """Of the first frontend; "" if there is none."""
        return next(iter(self._frontend_urls()), "")

    def _frontend_urls(self) -> list[str]:
        return [
            f"http://{pod.address}:{pod.plan.http_port}"
            for pod in self.pods
            if pod.plan.component_type == "frontend"
        ]

    @property
    def ready(self) -> bool:
        """Whether every Deployment has all the pods it wants, ready."""
        ready = [pod.plan.deployment for pod in self.pods if pod.ready]
        return all(ready.count(name) >= count for name, count in self._wanted.items())

    def record(self) -> UpRecord:
        pid = os.getpid()
        return UpRecord(
            pid=pid,
            started=started(pid) or 0,
            graph=self.graph,
            namespace=self.plan.namespace,
            url=self.url,
            state_dir=str(self.session.state),
            ready=self.ready and self._routed,
            pods=[
                PodRecord(
                    name=pod.name,
                    address=pod.address,
                    role=pod.plan.component_type,
                    port=pod.plan.http_port,
                    status_port=pod.plan.ports.get(STATUS_PORT),
                    pid=pod.pid,
                    ready=pod.ready,
                )
                for pod in self.pods
            ],
        )

    async def wait_ready(
        self,
        *,
        timeout_s: float | None,
        give_up_after: int | None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait until every pod is ready and the frontends route to all engines.

        Raises ``NotReady`` after ``timeout_s`` seconds, when a container failed ``give_up_after``
        times in a row without having been ready, or when a pod can't be run at all. ``waiting`` is
        called about once a second.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.ready:
            self._moved.clear()
            for task in self._tasks.values():
                if task.done() and not task.cancelled() and (error := task.exception()):
                    raise NotReady(f"{task.get_name()}: {error}")
            for pod in self.pods:
                for container in pod.containers:
                    if give_up_after is not None and container.failures >= give_up_after:
                        raise NotReady(
                            f"{pod.name}: container {container.plan.name!r} failed "
                            f"{container.failures} times without becoming ready "
                            f"({container.last_failure}); log: {container.launch.log}"
                        )
            if deadline is not None and time.monotonic() >= deadline:
                missing = "; ".join(f"{p.name}: {p.waits_for}" for p in self.pods if not p.ready)
                raise NotReady(f"not ready after {timeout_s:g} s: {missing}")
            waiting()
            try:
                async with asyncio.timeout(1.0):
                    await self._moved.wait()
            except TimeoutError:
                continue
        # A frontend that does not hear in time says so itself, and still answers.
        await until_routed(
            self._frontend_urls(),
            [pod.name for pod in self.pods if pod.plan.is_engine],
            ROUTED_S,
        )
        self._routed = True
        self._publish()


def _endpoint(pod: Pod) -> Endpoint:
    ports = pod.plan.ports
    return Endpoint(
        name=pod.name,
        address=pod.address,
        port=pod.plan.http_port,
        role=pod.plan.component_type,
        ready=pod.ready,
        terminating=pod.terminating,
        generation=pod.plan.labels.get(GENERATION_LABEL, ""),
        stream_port=ports.get(STREAM_PORT),
        status_port=ports.get(STATUS_PORT),
        labels=dict(pod.plan.labels),
    )
