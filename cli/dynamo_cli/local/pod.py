"""One pod: its folders, its containers in Kubernetes' order, its readiness, its end.

Order: init containers one after the other, restartable ones staying on; then all main containers
at once. At the end main containers first, all at once, then the sidecars in reverse.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dynamo_cli.local import volumes
from dynamo_cli.local.container import Container, Launch, Phase
from dynamo_cli.local.expand import (
    Machine,
    Objects,
    PodFacts,
    Unresolved,
    command_line,
    environment,
    expand,
    field_value,
)
from dynamo_cli.local.plan import ContainerPlan, PodPlan, Stage

# What a process gets of the caller's environment: who and where it is, how to reach the network,
# and where models and engines are. Everything else a manifest has to say.
INHERITED = frozenset({
    "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
    "no_proxy", "XDG_CACHE_HOME", "DYNAMO_CACHE", "DYN_VLLM_PYTHON", "CUDA_VISIBLE_DEVICES",
})  # fmt: skip
INHERITED_PREFIXES = ("LC_", "HF_")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pod lives on this machine."""

    name: str
    namespace: str
    address: str
    scratch: Path  # the pod's own: volumes, temporary files, working folder
    logs: Path  # the pod's own
    endpoints: Path  # the file that frontends and planners read
    scales: Path  # the socket that planners scale by
    run: str  # id of the run, opens every marker
    tell: Callable[[str], None]  # of the run's keeper


class MissingProgram(Exception):
    """A command that is not on this machine; the message names it."""


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of the caller's environment that processes get."""
    return {
        name: value
        for name, value in environ.items()
        if name in INHERITED or name.startswith(INHERITED_PREFIXES)
    }


def this_machine() -> Machine:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Machine(cpus=len(os.sched_getaffinity(0)), memory=pages * size)


class Pod:
    """A pod from its making to its end.

    Making it resolves everything (raises ``Unresolved``, ``Refused`` or ``MissingProgram``) and
    touches nothing; ``run`` makes its folders and processes; ``stop`` ends them.
    """

    def __init__(
        self,
        plan: PodPlan,
        place: Place,
        objects: Objects,
        changed: Callable[[Pod, Container | None, str, str], None],
    ) -> None:
        self.plan = plan
        self.place = place
        self.name = place.name
        self.address = place.address
        self.terminating = False
        self.notes: list[str] = []
        self._changed = changed
        self._facts = PodFacts(
            name=place.name,
            namespace=place.namespace,
            uid=str(uuid.uuid4()),
            ip=place.address,
            labels=plan.labels,
            annotations=plan.annotations,
            service_account=plan.service_account,
        )
        self._folders: list[dict[str, Path]] = []  # of each container: mount path -> real folder
        self.containers = [
            Container(c, self._launch(c, objects), plan.grace_s, self._report)
            for c in plan.containers
        ]
        self._fields = [
            {path: field_value(field, self._facts) for path, field in volume.fields}
            for volume in plan.volumes
        ]
        self._tasks: dict[Container, asyncio.Task[None]] = {}

    # --- making -------------------------------------------------------------------------------

    def _launch(self, container: ContainerPlan, objects: Objects) -> Launch:
        place = self.place
        try:
            declared, notes = environment(container.raw, self._facts, objects, this_machine())
        except Unresolved as error:
            raise Unresolved(
                f"{self.plan.deployment}, container {container.name!r}: {error}"
            ) from error
        self.notes += [f"{self.plan.deployment}, container {container.name!r}: {n}" for n in notes]
        forced = {
            "POD_IP": place.address,
            "HOSTNAME": place.name,
            "DYN_HTTP_HOST": place.address,
            "DYN_SYSTEM_HOST": place.address,
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_ENDPOINTS_FILE": str(place.endpoints),
        }
        if self.plan.component_type == "planner":
            forced["DYN_LOCAL_SCALE_SOCKET"] = str(place.scales)
        variables = declared | forced
        folders = {
            mount.path: volumes.mount_folder(
                place.scratch / "v" / mount.volume,
                expand(mount.sub_path_expression, variables) or mount.sub_path,
            )
            for mount in container.mounts
        }
        self._folders.append(folders)
        substitute = volumes.Substitution(folders)

        def resolve(text: str) -> str:
            return substitute(expand(text, variables))

        caller = objects.caller
        path = [str(folder) for folder in container.program.path]
        path.append(variables.get("PATH") or caller.get("PATH") or os.defpath)
        env = inherited(caller)
        env |= {name: substitute(value) for name, value in declared.items()}
        env |= forced
        env |= {
            "PATH": os.pathsep.join(path),
            "TMPDIR": str(folders.get("/tmp", place.scratch / "tmp")),
            "PYTHONUNBUFFERED": "1",
        }
        argv = [substitute(part) for part in command_line(container.program.argv, variables)]
        found = shutil.which(argv[0], path=env["PATH"])
        if found is None and not argv[0].startswith(str(place.scratch)):
            raise MissingProgram(
                f"{self.plan.deployment}, container {container.name!r}: "
                f"program {argv[0]!r} is not on this machine"
            )
        cwd = place.scratch / "work"
        if container.working_dir:
            wanted = Path(resolve(container.working_dir))
            if wanted.is_dir() or wanted.is_relative_to(place.scratch):
                cwd = wanted
            else:
                self.notes.append(
                    f"{self.plan.deployment}, container {container.name!r}: workingDir "
                    f"{container.working_dir} is not on this machine; an empty folder is used"
                )
        return Launch(
            argv=(found or argv[0], *argv[1:]),
            env=env,
            cwd=cwd,
            log=place.logs / f"{container.name}.log",
            address=place.address,
            marker=f"{place.run}/{place.name}/{container.name}",
            tell=place.tell,
            resolve=resolve,
        )

    def _make_folders(self) -> None:
        for name in ("tmp", "work"):
            (self.place.scratch / name).mkdir(parents=True)
        self.place.logs.mkdir(parents=True, exist_ok=True)
        for volume, fields in zip(self.plan.volumes, self._fields, strict=True):
            volumes.make_volume(volume, self.place.scratch / "v" / volume.name, fields)
        for folders in self._folders:
            for folder in folders.values():
                if not folder.exists():  # a subPath
                    folder.mkdir(parents=True)
            volumes.link_nested(folders)

    # --- state --------------------------------------------------------------------------------

    def _report(self, container: Container, line: str, tail: str) -> None:
        self._changed(self, container, line, tail)

    @property
    def _lasting(self) -> list[Container]:
        return [c for c in self.containers if c.plan.stage is not Stage.INIT]

    @property
    def ready(self) -> bool:
        return not self.terminating and all(c.ready for c in self._lasting)

    @property
    def pid(self) -> int | None:
        """The process of the first main container."""
        mains = [c for c in self.containers if c.plan.stage is Stage.MAIN]
        return mains[0].pid if mains else None

    @property
    def restarts(self) -> int:
        return sum(c.restarts for c in self.containers)

    @property
    def state(self) -> str:
        """One word for the view."""
        if self.terminating:
            return "stopping"
        if any(c.phase is Phase.BACK_OFF for c in self.containers):
            return "back-off"
        if self.ready:
            return "ready"
        return "starting" if self._tasks else "waiting"

    @property
    def waits_for(self) -> str:
        """What the pod is waiting for, in a few words; "" if nothing."""
        if self.terminating:
            left = [c.plan.name for c in self.containers if c.phase is Phase.RUNNING]
            return f"end of {', '.join(left)}" if left else ""
        for container in self.containers:
            if container.plan.stage is Stage.INIT:
                if container.phase is not Phase.DONE:
                    what = "running" if container.phase is Phase.RUNNING else container.waits_for
                    return f"init {container.plan.name}: {what}"
            elif not container.ready:
                one = len(self.plan.containers) == 1
                return (
                    container.waits_for if one else f"{container.plan.name}: {container.waits_for}"
                )
        return ""

    # --- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the pod until ``stop``."""
        await asyncio.to_thread(self._make_folders)
        for container in self.containers:
            if self.terminating:
                break
            task = asyncio.create_task(container.supervise())
            self._tasks[container] = task
            if container.plan.stage is Stage.INIT:
                await task
            elif container.plan.stage is Stage.SIDECAR:
                started = asyncio.create_task(container.started.wait())
                await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
                started.cancel()
        await asyncio.gather(*self._tasks.values())

    async def stop(self, grace_s: float | None = None) -> None:
        """End the pod within its grace period: unready at once, then its processes."""
        self.terminating = True
        self._changed(self, None, "", "")
        deadline = time.monotonic() + (self.plan.grace_s if grace_s is None else grace_s)
        sidecars = [c for c in reversed(self.containers) if c.plan.stage is Stage.SIDECAR]
        await self._stop_all([c for c in self.containers if c not in sidecars], deadline)
        for sidecar in sidecars:
            await self._stop_all([sidecar], max(deadline, time.monotonic() + 2.0))

    async def _stop_all(self, containers: list[Container], deadline: float) -> None:
        for container in containers:
            container.request_stop(max(0.0, deadline - time.monotonic()))
        tasks = [self._tasks[c] for c in containers if c in self._tasks]
        await asyncio.gather(*tasks, return_exceptions=True)
