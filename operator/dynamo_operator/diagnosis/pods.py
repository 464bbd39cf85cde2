"""Why a pod is not ready, in words that say what to do.

A pod tells it in many places: its scheduling, the containers' waiting and terminated states, what
they wrote last, its conditions. The most telling one counts. Words are chosen so that they stay the
same while nothing changes: no ages, no restart counts, no names of pods; a container that crashes
is called so also in the moments in which it runs or has just ended.

Sources: Kubernetes' pod lifecycle; the kubelet's reasons of waiting containers
(pkg/kubelet/images/types.go, pkg/kubelet/container/sync_result.go).
"""

import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dynamo_operator.diagnosis.capacity import unschedulable
from dynamo_operator.diagnosis.fields import at, condition, count, items, label, text
from dynamo_operator.diagnosis.wording import bounded, last_words, one_line, reason_or
from dynamo_operator.render import names

MANY_RESTARTS = 3
"""Restarts from which on a crashing container is not expected to recover by itself."""

_TELLING = (
    "InvalidImageName",
    "ImagePullBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "OOMKilled",
    "CrashLoopBackOff",
    "QuotaExceeded",
    "FailedCreate",
    "Evicted",
    "Unschedulable",
    "SchedulingGated",
    "NotReady",
    "ContainerCreating",
    "Starting",
)
_IMAGE = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
        "InvalidImageName",
    }
)
_BETWEEN_CRASHES = frozenset({"", "ContainerCreating", "PodInitializing", "CrashLoopBackOff"})
"""What a container that has crashed waits for, or "" while it runs or has just ended."""

_WRAPPING = re.compile(
    r"Back-off pulling image \"[^\"]*\"(?:: )?"
    r"|ErrImagePull: |rpc error: code = \w+ desc = |failed commit on ref \"[^\"]*\": "
    r"|[Ff]ailed to (?:pull and unpack|pull|resolve) (?:image|reference) \"[^\"]*\": "
    r"|[Ee]rror (?:pulling|reading) image \"?[^\" ]*\"?: "
)


_REGISTRY_AWAY = (
    "i/o timeout",
    "no such host",
    "connection refused",
    "connection reset",
    "tls handshake timeout",
    "deadline exceeded",
    "service unavailable",
    "too many requests",
    "server misbehaving",
)
"""What a registry that is away, and may come back, is told by."""
_SOCKETS = re.compile(r"[0-9a-f.:\[\]]+:\d+->")
"""The near end of a connection, another one at each try."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why one pod is not ready."""

    reason: str
    """One word, Kubernetes' own where it has one; those of `_TELLING` come first."""
    detail: str
    """What is the matter and what to do."""
    fault: Literal["", "template", "cluster"] = ""
    """"" while it just starts; "template": what is in the pod fails (image, configuration,
    program); "cluster": nodes, quota, eviction."""
    lasting: bool = False
    """Whether somebody has to do something: it will not heal by itself."""
    counted: bool = False
    """Whether that is known from how often it happened, not from its kind."""

    @property
    def rank(self) -> int:
        """0 is the most telling reason; unknown ones come with the container errors."""
        return _TELLING.index(self.reason if self.reason in _TELLING else "RunContainerError")


@dataclass(frozen=True, slots=True)
class Group:
    """Pods of one component that have the same trouble."""

    trouble: Trouble
    pods: int
    """How many; 0 if the trouble is that there are none."""
    of: int
    """Pods that exist."""
    component: str

    def __str__(self) -> str:
        """`ImagePullBackOff on 1 of 3 worker pods: …`."""
        if not self.pods:
            return f"{self.trouble.reason} of {self.component} pods: {self.trouble.detail}"
        pods = "pod" if self.of == 1 else "pods"
        counts = f"{self.pods} of {self.of} {self.component} {pods}"
        return f"{self.trouble.reason} on {counts}: {self.trouble.detail}"


def grouped(component: str, pods: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The troubles of a component's `pods`, one group a reason, the most telling first."""
    found = [trouble(pod) for pod in pods]
    by_reason: dict[str, list[Trouble]] = {}
    for item in found:
        if item is not None:
            by_reason.setdefault(item.reason, []).append(item)
    groups = [
        Group(
            Trouble(
                reason,
                min(t.detail for t in troubles),
                max(t.fault for t in troubles),
                any(t.lasting for t in troubles),
            ),
            len(troubles),
            len(found),
            component,
        )
        for reason, troubles in by_reason.items()
    ]
    return sorted(groups, key=lambda group: (group.trouble.rank, group.trouble.reason))


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether the pod's condition Ready is true."""
    return condition(pod, "Ready").get("status") == "True"


def is_leaving(pod: Mapping[str, Any]) -> bool:
    """Whether the pod is being deleted: it drains, and no workload counts it any more."""
    return bool(at(pod, "metadata", "deletionTimestamp"))


def has_ended(pod: Mapping[str, Any]) -> bool:
    """Whether the pod is over for good (evicted, refused by its node): it will be replaced."""
    return text(pod, "status", "phase") in ("Failed", "Succeeded")


def trouble(pod: Mapping[str, Any]) -> Trouble | None:
    """Why the pod is not ready; None if it is, or is leaving."""
    if is_leaving(pod) or is_ready(pod):
        return None
    if has_ended(pod):
        why = one_line(text(pod, "status", "message")) or "the pod has ended and will be replaced"
        reason = reason_or(text(pod, "status", "reason"), "Evicted")
        return Trouble(reason, why, "cluster")
    scheduling = condition(pod, "PodScheduled")
    if scheduling.get("status") == "False":
        if scheduling.get("reason") == "SchedulingGated":
            gates = sorted(text(gate, "name") for gate in items(pod, "spec", "schedulingGates"))
            return Trouble("SchedulingGated", f"held by {', '.join(gates)}", "cluster")
        why = unschedulable(text(scheduling, "message"), pod)
        return Trouble("Unschedulable", why, "cluster")
    found = [t for status, spec, init in _containers(pod) if (t := _container(status, spec, init))]
    if found:
        worst = min(found, key=lambda t: t.rank)
        return worst if worst.fault else _starting(pod, worst)
    if not text(pod, "spec", "nodeName"):
        return Trouble("Starting", "waiting for the scheduler")
    return _starting(pod, Trouble("ContainerCreating", ""))


# --- containers


def _containers(
    pod: Mapping[str, Any],
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], bool]]:
    """(status, spec, whether it is an init container that has to end) of each container."""
    for statuses, specs in (
        ("initContainerStatuses", "initContainers"),
        ("containerStatuses", "containers"),
    ):
        spec = {text(c, "name"): c for c in items(pod, "spec", specs)}
        for status in items(pod, "status", statuses):
            of = spec.get(text(status, "name"), {})
            init = specs == "initContainers" and of.get("restartPolicy") != "Always"
            yield status, of, init


def _container(status: Mapping[str, Any], spec: Mapping[str, Any], init: bool) -> Trouble | None:
    if status.get("ready") is True and not init:
        return None
    name = text(status, "name") or "main"
    waiting = text(status, "state", "waiting", "reason")
    said = one_line(text(status, "state", "waiting", "message"))
    restarts = count(status, "restartCount")
    if waiting in _IMAGE:
        return _image(waiting, said, text(spec, "image") or text(status, "image"))
    if waiting == "CreateContainerConfigError":
        detail = f"container {name}: {said}; create it, or mark the reference optional"
        return Trouble(waiting, detail, "template", True)
    ended = at(status, "state", "terminated")
    if init and ended and count(ended, "exitCode") == 0:
        return None
    ended = ended or at(status, "lastState", "terminated")
    if isinstance(ended, dict) and waiting in _BETWEEN_CRASHES:
        return _crash(f"{'init ' if init else ''}container {name}", ended, spec, restarts)
    if waiting == "PodInitializing":
        return None  # an init container tells
    if waiting == "ContainerCreating" or not (waiting or at(status, "state", "running")):
        return Trouble("ContainerCreating", "")
    if waiting:
        reason = reason_or(waiting, "RunContainerError")
        detail = f"container {name}{f': {said}' if said else ' does not start'}"
        return Trouble(reason, detail, "template", reason != "CrashLoopBackOff")
    if init:
        return Trouble("Starting", f"init container {name} runs")
    if status.get("started") is False:
        return Trouble("Starting", f"container {name} has not passed its startup probe yet")
    return Trouble("NotReady", name)


def _image(waiting: str, said: str, image: str) -> Trouble:
    if waiting == "ErrImageNeverPull":
        detail = f"{image}: the node does not have it and imagePullPolicy is Never"
        return Trouble("ImagePullBackOff", detail, "template", True)
    reason = "InvalidImageName" if waiting == "InvalidImageName" else "ImagePullBackOff"
    cause = _WRAPPING.sub("", said).removeprefix(f"{image}: ")
    low = cause.lower()
    if any(word in low for word in ("unauthorized", "denied", "forbidden", "authentication")):
        hint = "; give imagePullSecrets that may read it"
    elif reason == "InvalidImageName" or any(
        word in low for word in ("not found", "manifest unknown", "no such")
    ):
        hint = "; correct the image's name or push it"
    else:
        hint = ""
    cause = _SOCKETS.sub("", cause)
    detail = f"{image}: {bounded(cause or 'pulling fails', 240)}{hint}"
    if any(words in low for words in _REGISTRY_AWAY):
        return Trouble(reason, f"{detail}; is the registry reachable from the node?", "cluster")
    return Trouble(reason, detail, "template", True)


def _crash(what: str, ended: Mapping[str, Any], spec: Mapping[str, Any], restarts: int) -> Trouble:
    lasting = restarts >= MANY_RESTARTS
    if text(ended, "reason") == "OOMKilled":
        limit = at(spec, "resources", "limits", "memory")
        over = f" of {limit}" if isinstance(limit, str | int) else ""
        detail = f"{what} needs more than its memory limit{over}; raise it"
        return Trouble("OOMKilled", detail, "template", lasting, counted=True)
    words = last_words(text(ended, "message"))
    more = f": {words}" if words else "; see its log with kubectl logs --previous"
    detail = f"{what} ended with {exit_text(count(ended, 'exitCode'))}{more}"
    return Trouble("CrashLoopBackOff", detail, "template", lasting, counted=True)


def exit_text(code: int) -> str:
    """`exit code 137 (SIGKILL)`: shells and runtimes report a signal as 128 + its number."""
    meaning = {126: "not executable", 127: "command not found"}.get(code, "")
    if code > 128:
        try:
            meaning = signal.Signals(code - 128).name
        except ValueError:
            meaning = ""
    return f"exit code {code}{f' ({meaning})' if meaning else ''}"


# --- pods that just start, or have stopped being ready


def _starting(pod: Mapping[str, Any], mildest: Trouble) -> Trouble:
    """`mildest`, the trouble of a container that has no fault, put into words of the pod."""
    if mildest.reason == "ContainerCreating":
        if condition(pod, "PodReadyToStartContainers").get("status") == "True":
            images = sorted({text(c, "image") for c in items(pod, "spec", "containers")})
            return Trouble("ContainerCreating", f"the node pulls {', '.join(images)}")
        needs = ", ".join(_needs(pod))
        must = f" ({needs} must exist)" if needs else ""
        return Trouble("ContainerCreating", f"the node sets up volumes and network{must}")
    if mildest.reason != "NotReady":
        return mildest
    name = mildest.detail
    detail = f"container {name} runs and its readiness probe fails"
    if label(pod, names.CLASS_LABEL) == "worker":
        detail += ": the engine is not healthy, or no picker follows it"
    if _was_ready(pod, name):
        return Trouble("NotReady", f"{detail}; it was ready before", "template")
    return Trouble("NotReady", detail)


def _was_ready(pod: Mapping[str, Any], name: str) -> bool:
    """Whether the pod has been ready since the container started: Ready turned false after."""
    turned = text(condition(pod, "Ready"), "lastTransitionTime")
    for status in items(pod, "status", "containerStatuses"):
        if text(status, "name") == name:
            started = text(status, "state", "running", "startedAt")
            return bool(started) and turned > started
    return False


def _needs(pod: Mapping[str, Any]) -> list[str]:
    """What the pod's volumes wait for: objects that have to exist before a container starts."""
    found = set()
    for volume in items(pod, "spec", "volumes"):
        for kind, field, key in (
            ("Secret", "secret", "secretName"),
            ("ConfigMap", "configMap", "name"),
            ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
        ):
            source = at(volume, field)
            if text(source, key) and at(source, "optional") is not True:
                found.add(f"{kind} {text(source, key)}")
    return sorted(found)
