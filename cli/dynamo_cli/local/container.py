"""One container as a process: started, probed, restarted with back-off, stopped within its grace.

A container ends when its first process ends: whatever that process started is killed with it, as a
container runtime does, so that a restart never meets leftovers of the run before.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from dynamo_runtime.child import Child, signal_group

from dynamo_cli.local import keeper
from dynamo_cli.local.asking import Answer, ask
from dynamo_cli.local.backoff import Backoff
from dynamo_cli.local.plan import ContainerPlan, Hook, Sleep, Stage
from dynamo_cli.local.probes import ContainerProbes, Kind, ProbeState

LEAST_GRACE_S = 2.0  # Kubernetes leaves a container at least this after its preStop hook
RAN_WELL_S = 30.0  # a run this long of a container without probes counts as having been ready
TAIL_LINES = 12
TAIL_BYTES = 16384


class Phase(enum.Enum):
    WAITING = "waiting"  # its turn hasn't come
    RUNNING = "running"
    BACK_OFF = "back-off"  # ended, to be started again
    DONE = "done"  # an init container that succeeded
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything needed to start the process: nothing left to resolve."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    log: Path
    address: str
    marker: str  # <run>/<pod>/<container>: the attempt is added at each start
    tell: Callable[[str], None]  # of the run's keeper, which process group is to go with the run
    resolve: Callable[[str], str]  # expands and substitutes one more text (hooks, exec probes)


# Called at each change with a line for the user ("" for none) and the log's tail that explains it.
Report = Callable[["Container", str, str], None]


class Container:
    """Supervises one container until ``stop``."""

    def __init__(self, plan: ContainerPlan, launch: Launch, grace_s: float, report: Report) -> None:
        self.plan = plan
        self.launch = launch
        self.phase = Phase.WAITING
        self.detail = ""  # why it is in this phase, for the view
        self.restarts = 0
        self.failures = 0  # runs in a row that ended before the container was ready
        self.last_failure = ""
        self.pid: int | None = None
        self.started = asyncio.Event()  # startup probe passed (or done, for an init container)
        self._grace_s = grace_s
        self._report = report
        self._probes: ContainerProbes | None = None
        self._backoff = Backoff()
        self._stop: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._log_start = 0

    @property
    def _marker(self) -> str:
        return f"{self.launch.marker}/{self.restarts}/"

    @property
    def ready(self) -> bool:
        return (
            self.phase is Phase.RUNNING
            and self._probes is not None
            and self._probes.ready
            and self.started.is_set()
        )

    @property
    def waits_for(self) -> str:
        """What keeps the container from being ready, in a few words; "" if nothing does."""
        if self.phase is Phase.RUNNING and self._probes is not None:
            state = self._probes.waiting_for
            return "" if state is None else f"{state.probe.kind.value}: {state.message}"
        return self.detail or self.phase.value

    def request_stop(self, grace_s: float) -> None:
        """Ask ``supervise`` to stop the container within ``grace_s`` seconds and return."""
        if not self._stop.done():
            self._stop.set_result(grace_s)

    async def supervise(self) -> None:
        """Run until stopped; an init container, until it succeeds."""
        try:
            while not self._stop.done():
                began = time.monotonic()
                outcome = await self._run_once()
                if self._stop.done():
                    break
                if self.plan.stage is Stage.INIT and outcome is None:
                    self.phase, self.detail = Phase.DONE, ""
                    self.started.set()
                    self._report(self, "", "")
                    return
                await self._back_off(outcome or "exited with status 0", time.monotonic() - began)
        finally:
            if self.phase is not Phase.DONE:
                self.phase, self.detail = Phase.STOPPED, ""
            self._report(self, "", "")

    async def _back_off(self, outcome: str, ran_s: float) -> None:
        wait = self._backoff.after(ran_s)
        if not self.plan.probes and ran_s >= RAN_WELL_S:
            self.failures = 0
        self.failures += 1
        self.last_failure = outcome
        self.phase, self.detail = Phase.BACK_OFF, f"{outcome}; again in {wait:g} s"
        self._report(self, self.detail, self.tail())
        await asyncio.wait([self._stop], timeout=wait)
        self.restarts += 1

    def tail(self) -> str:
        """The last lines that this run of the container wrote, indented."""
        try:
            with self.launch.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [part for line in text.rstrip().splitlines() for part in _readable(line)]
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])

    async def _run_once(self) -> str | None:
        """One run of the process. ``None``: it succeeded or was stopped; else what went wrong."""
        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        marker = self._marker
        with self.launch.log.open("ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            try:
                child = await Child.start(
                    self.launch.argv,
                    env={**self.launch.env, keeper.MARKER: marker},
                    cwd=self.launch.cwd,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                )
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                return f"can't start {self.launch.argv[0]}: {reason}"
        self.launch.tell(f"group {child.pid}")
        self.pid = child.pid
        self.phase, self.detail = Phase.RUNNING, ""
        self._probes = ContainerProbes(self.plan.probes, time.monotonic())
        if self._probes.started and self.plan.stage is not Stage.INIT:
            self.started.set()
        self._report(self, "", "")
        exited = asyncio.create_task(child.wait())
        watch = asyncio.create_task(self._watch())
        try:
            first: list[asyncio.Future[Any]] = [exited, watch, self._stop]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                status = exited.result()
                return None if status == 0 else _ended(status)
            if self._stop.done():
                watch.cancel()
                await self._terminate(child, self._stop.result())
                return None
            reason, grace_s = watch.result()
            self._report(self, f"{reason}: restarting it", "")
            await self._terminate(child, self._grace_s if grace_s is None else grace_s)
            return reason
        finally:
            for task in (exited, watch):
                task.cancel()
            await asyncio.gather(exited, watch, return_exceptions=True)
            signal_group(child.pid, signal.SIGKILL)
            await asyncio.shield(asyncio.to_thread(keeper.sweep, marker))
            await child.wait()
            self.launch.tell(f"ended {child.pid}")
            self.pid = None
            self._probes = None
            if self.plan.stage is not Stage.INIT:
                self.started.clear()

    async def _watch(self) -> tuple[str, float | None]:
        """Probe the running container; return (why it must be restarted, grace) when it must."""
        assert self._probes is not None
        if self.plan.post_start is not None:
            answer = await self._hook(self.plan.post_start, self._grace_s)
            if not answer.ok:
                return f"postStart hook failed: {answer.message}", None
        startup = self._probes.get(Kind.STARTUP)
        if startup is not None:
            failed = await self._ask(startup)
            if failed is not None:
                return failed
            self.started.set()
            self._report(self, "", "")
        states = [self._probes.get(kind) for kind in (Kind.LIVENESS, Kind.READINESS)]
        tasks = [asyncio.create_task(self._ask(state)) for state in states if state is not None]
        if not tasks:
            await asyncio.get_running_loop().create_future()  # nothing to ask: wait to be cancelled
        try:
            while True:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (failed := task.result()) is not None:
                        return failed
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, state: ProbeState) -> tuple[str, float | None] | None:
        """Ask a probe for as long as it matters.

        Returns (reason, grace) for a restart, or ``None`` for a startup probe that passed.
        """
        assert self._probes is not None
        probe = state.probe
        while True:
            await asyncio.sleep(max(0.0, state.next_due - time.monotonic()))
            asked = time.monotonic()
            answer = await ask(probe.action, self.launch.address, probe.timeout, self._run_inside)
            before = state.message
            changed = state.record(asked, answer.ok, answer.message)
            if self._probes.ready:
                self.failures = 0
            if self._probes.failed is state:
                return f"{probe.kind.value} probe failed ({answer.message})", probe.grace
            if changed and probe.kind is Kind.READINESS and not state.result:
                self._report(self, f"no longer ready: {answer.message}", "")
            elif changed or answer.message != before:
                self._report(self, "", "")
            if probe.kind is Kind.STARTUP and state.result:
                return None

    async def _terminate(self, child: Child, grace_s: float) -> None:
        """preStop hook, SIGTERM, SIGKILL to all that is left when the grace period is over."""
        deadline = time.monotonic() + grace_s
        left = grace_s
        if self.plan.pre_stop is not None and grace_s > 0:
            answer = await self._hook(self.plan.pre_stop, grace_s)
            if not answer.ok:
                self._report(self, f"preStop hook failed: {answer.message}", "")
            left = max(LEAST_GRACE_S, deadline - time.monotonic())
        await child.stop(left)

    async def _hook(self, hook: Hook, limit_s: float) -> Answer:
        if isinstance(hook, Sleep):
            await asyncio.sleep(min(hook.seconds, limit_s))
            return Answer(True, "")
        return await ask(hook, self.launch.address, limit_s, self._run_inside)

    async def _run_inside(self, command: tuple[str, ...]) -> tuple[int, str]:
        """Run a command as `kubectl exec` would; (exit status, output)."""
        output: list[str] = []
        argv = [self.launch.resolve(part) for part in command]
        env = {**self.launch.env, keeper.MARKER: self._marker}
        try:
            child = await Child.start(argv, env=env, cwd=self.launch.cwd, on_line=output.append)
        except OSError as error:
            return 127, f"{argv[0]}: {error.strerror}"
        try:
            status = await child.wait()
        finally:
            signal_group(child.pid, signal.SIGKILL)
            with contextlib.suppress(asyncio.CancelledError):
                await child.wait()
        return status, "\n".join(output)


def _readable(line: str) -> list[str]:
    """A line of our own JSON log as a person wants it; any other line as it is."""
    if not line.startswith("{"):
        return [line]
    try:
        entry = msgspec.json.decode(line, type=_LogLine)
    except msgspec.DecodeError:
        return [line]
    return [*f"{entry.level} {entry.message}".splitlines(), *entry.exception.splitlines()]


class _LogLine(msgspec.Struct):
    level: str
    message: str
    exception: str = ""


def _ended(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
