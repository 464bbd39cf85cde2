"""What of a graph the API server is asked about before the graph is let in, and what it answers.

Our schema declares only the core of a pod template; the rest is Kubernetes' to judge. So workloads
and Services are rendered and created with `dryRun`, which stores nothing, and what the API server
says of `spec.template.spec.containers[0].ports[2]` is told as the author's own field.

Only what its content is refused for denies the graph: 422, and 400 where the body can't be read as
its kind. Everything else (quota, rights, a kind that is not installed, no answer) is the cluster's
state, which may have changed by the time the operator applies the same objects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_crds.problem import show_path
from dynamo_crds.schema import Path
from dynamo_crds.v1beta1 import DynamoGraphDeployment

from dynamo_operator.admission.review import Denial, Json
from dynamo_operator.admission.wording import Wording
from dynamo_operator.render import Rendered, names

TRIED = ("Deployment", "LeaderWorkerSet", "Service")
_TEMPLATES = {
    "Deployment": (("spec", "template"),),
    "LeaderWorkerSet": (
        ("spec", "leaderWorkerTemplate", "leaderTemplate"),
        ("spec", "leaderWorkerTemplate", "workerTemplate"),
    ),
}
_UNREADABLE = "cannot be handled as a"


@dataclass(frozen=True, slots=True)
class Component:
    """A component as its author wrote it: where field names lead back to."""

    index: int
    name: str
    template: Json
    graph_env: tuple[str, ...]
    """Names of the graph's own variables, in order."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One rendered object to ask about."""

    manifest: Json
    component: Component | None

    @property
    def label(self) -> str:
        return f"{self.manifest['kind']} {self.manifest['metadata']['name']}"


def trials(
    graph: DynamoGraphDeployment, rendered: Rendered, before: Rendered | None
) -> tuple[Trial, ...]:
    """The objects of `graph` that are new or changed.

    Both states are rendered here and now, so an operator's own upgrade makes no difference; and
    without replicas, because how many there are needs no trial.
    """
    known = {} if before is None else _tried(before)
    env = tuple(entry.name for entry in graph.spec.env)
    components = {
        component.name: Component(index, component.name, component.pod_template or {}, env)
        for index, component in enumerate(graph.spec.components)
    }
    return tuple(
        Trial(manifest, components.get(_component_of(manifest)))
        for key, manifest in _tried(rendered).items()
        if known.get(key) != manifest
    )


def _tried(rendered: Rendered) -> dict[tuple[str, str], Json]:
    return {
        (manifest["kind"], manifest["metadata"]["name"]): manifest
        for manifest in rendered.manifests
        if manifest["kind"] in TRIED
    }


def _component_of(manifest: Json) -> str:
    return str((manifest["metadata"].get("labels") or {}).get(names.COMPONENT_LABEL, ""))


# --- what a dry run does not find -----------------------------------------------------------------

_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "env": ("name",),
    "hostAliases": ("ip",),
    "imagePullSecrets": ("name",),
    "initContainers": ("name",),
    "ports": ("containerPort", "protocol"),
    "resourceClaims": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "volumeDevices": ("devicePath",),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
"""Lists of a pod whose items server-side apply tells apart by these fields (Kubernetes' API:
`x-kubernetes-list-map-keys`)."""


def doubled(trial: Trial, wording: Wording) -> Iterator[Denial]:
    """List items that server-side apply can't tell apart. A creation only warns of some of them,
    but the operator could never apply the object."""
    for root in _TEMPLATES.get(trial.manifest["kind"], ()):
        template: Any = trial.manifest
        for step in root:
            template = template[step]
        yield from _doubled(trial, template, root, wording)


def _doubled(trial: Trial, value: Any, path: Path, wording: Wording) -> Iterator[Denial]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _doubled(trial, item, (*path, name), wording)
    elif isinstance(value, list):
        keys = _KEYS.get(str(path[-1]))
        seen: set[tuple[Any, ...]] = set()
        for index, item in enumerate(value):
            here = (*path, index)
            if keys is not None and isinstance(item, Mapping):
                identity = tuple(item.get(key, _IMPLIED.get(key)) for key in keys)
                if identity in seen:
                    message = f"{identity[0]} is given twice; keep one of them"
                    yield _denial(trial, (*here, keys[0]), message, wording)
                seen.add(identity)
            yield from _doubled(trial, item, here, wording)


_IMPLIED = {"protocol": "TCP"}


# --- answers --------------------------------------------------------------------------------------


def refused(
    trial: Trial, status: int, message: str, body: Mapping[str, Any], wording: Wording
) -> list[Denial]:
    """What the API server has against the object's content; none if it refused for another reason.

    `body` is the Status object that it answered with.
    """
    if status == 400 and _UNREADABLE in message:
        return [_denial(trial, path, text, wording) for path, text in _unreadable(message)]
    if status != 422:
        return []
    details = body.get("details")
    causes = details.get("causes") if isinstance(details, Mapping) else None
    found = [
        _denial(trial, tokens(str(cause.get("field") or "")), str(cause["message"]), wording)
        for cause in causes or []
        if isinstance(cause, Mapping) and cause.get("message")
    ]
    return found or [_denial(trial, (), message, wording)]


def circumstance(trial: Trial, status: int, message: str) -> str | None:
    """A warning where the object couldn't be judged; None if there is nothing to say."""
    if status == 409:
        return None  # it exists: its content was judged before its name
    if status == 404:
        return f"{trial.label}: the API server has no {trial.manifest['apiVersion']} yet"
    return f"{trial.label} could not be tried: {message}"


_STRICT = re.compile(r'(unknown|duplicate) field "([^"]+)"')
_GO_FIELD = re.compile(r"cannot unmarshal (\S+) into Go struct field \w+\.(\S+) of type (\S+)")


def _unreadable(message: str) -> Iterator[tuple[Path, str]]:
    """Fields and words of an answer of the API server's decoder."""
    reason = message.split(": ", 1)[-1]
    strict = _STRICT.findall(message)
    for what, field in strict:
        yield tokens(field), "no such field" if what == "unknown" else "given twice"
    if strict:
        return
    if match := _GO_FIELD.search(message):
        found, field, wanted = match.groups()
        yield tokens(field), f"found a {found}, expected {_plain_type(wanted)}"
    else:
        yield (), reason


def _plain_type(go: str) -> str:
    if go.startswith("[]"):
        return "a list"
    if go.startswith("map["):
        return "a mapping"
    base = go.lstrip("*")
    words = {"string": "a text", "bool": "true or false"}
    if base.startswith(("int", "uint")):
        return "an integer"
    return words.get(base, "a mapping" if "." in base else base)


_TOKEN = re.compile(r"\.?([^.\[\]]+)|\[([^\]]*)\]")


def tokens(field: str) -> Path:
    """`spec.containers[0].limits[nvidia.com/gpu]` in its parts: numbers for list items."""
    parts: list[str | int] = []
    for plain, bracketed in _TOKEN.findall(field):
        text = plain or bracketed
        parts.append(int(text) if bracketed and text.isdigit() else text)
    return tuple(parts)


def _denial(trial: Trial, path: Path, message: str, wording: Wording) -> Denial:
    component = trial.component
    if path[:2] in (("metadata", "labels"), ("metadata", "annotations")):
        return Denial(show_path(("spec", *path[1:])), message, "dry_run")
    if not path and trial.manifest["kind"] in _TEMPLATES:
        path = _TEMPLATES[trial.manifest["kind"]][0]  # what is ours in it is in order
    place = None if component is None else _authored(trial, component, path)
    if component is None or place is None:
        field = "spec" if component is None else wording.component(component.index, component.name)
        there = f": {show_path(path)}" if path else ""
        return Denial(field, f"rendered {trial.label}{there}: {message}", "dry_run")
    if place[:1] == ("env",):
        return Denial(wording.graph_env(*place[1:]), message, "dry_run")
    field = wording.in_pod_template(
        component.index, component.name, place, _container(component.template, place)
    )
    return Denial(field, f"{message} ({wording.noun(component.name)})", "dry_run")


def _container(template: Json, place: Path) -> str | None:
    """Name of the container that a path into the author's template leads into."""
    if place[:2] != ("spec", "containers") or len(place) < 3 or not isinstance(place[2], int):
        return None
    items = (template.get("spec") or {}).get("containers") or []
    return str(items[place[2]].get("name")) if place[2] < len(items) else None


def _authored(trial: Trial, component: Component, path: Path) -> Path | None:
    """Where the author said what a rendered object has at `path`; None where nobody did.

    The answer is a path in the component's pod template, or ("env", index, …) for a variable of
    the graph. List items are found by what identifies them, because rendering adds and reorders.
    """
    for root in _TEMPLATES.get(trial.manifest["kind"], ()):
        if path[: len(root)] != root:
            continue
        rest = path[len(root) :]
        if rest[:1] in (("labels",), ("annotations",)):
            rest = ("metadata", *rest)
        rendered: Any = trial.manifest
        for step in root:
            rendered = rendered[step]
        return _followed(rendered, component.template, rest, component.graph_env)
    return None


def _followed(rendered: Any, author: Any, path: Path, env: tuple[str, ...]) -> Path | None:
    done: list[str | int] = []
    for position, step in enumerate(path):
        if isinstance(step, int):
            item = rendered[step] if _has(rendered, step) else None
            index = _same_item(item, author)
            if index is None:
                name = item.get("name") if isinstance(item, Mapping) else None
                if done[-1:] == ["env"] and name in env:
                    return ("env", env.index(str(name)), *path[position + 1 :])
                return None
            done.append(index)
            rendered, author = item, author[index]
        else:
            done.append(step)
            rendered = rendered.get(step) if isinstance(rendered, Mapping) else None
            author = author.get(step) if isinstance(author, Mapping) else None
    return tuple(done)


def _has(items: Any, index: int) -> bool:
    return isinstance(items, list) and index < len(items)


_IDENTITIES = ("name", "mountPath", "containerPort", "key", "topologyKey")


def _same_item(item: Any, author: Any) -> int | None:
    """Index in the author's list of the item that was rendered as `item`."""
    if not isinstance(author, list):
        return None
    if item in author:
        return author.index(item)
    if not isinstance(item, Mapping):
        return None
    for identity in _IDENTITIES:
        if item.get(identity) is None:
            continue
        for index, candidate in enumerate(author):
            if isinstance(candidate, Mapping) and candidate.get(identity) == item[identity]:
                return index
    return None
