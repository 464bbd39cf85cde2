"""Gathering: from the informers' caches to the `Observed` of one graph, without a request.

Objects are sorted by graph as they arrive, so that a reconcile looks at its own graph only. A cache
is behind what was just written; so the answers to our own writes are kept until the cache has
caught up, and a reconcile never decides on a past that it changed itself.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dynamo_crds.v1beta1 import DynamoGraphDeployment
from dynamo_runtime.kubernetes import resources
from dynamo_runtime.kubernetes.resources import Resource
from pydantic import ValidationError

from dynamo_operator.reconcile import revisions
from dynamo_operator.reconcile.observed import Json, Key, Observed
from dynamo_operator.reconcile.ownership import FIELD_MANAGER, is_left_behind
from dynamo_operator.render import names

GraphKey = tuple[str, str]
"""namespace, name of a graph."""

Place = tuple[str, str]
"""namespace, name of a graph as its label has it."""

CHILDREN: tuple[Resource, ...] = (
    resources.DEPLOYMENTS,
    resources.SERVICES,
    resources.CONFIG_MAPS,
    resources.SERVICE_ACCOUNTS,
    resources.ROLES,
    resources.ROLE_BINDINGS,
    resources.PVCS,
    resources.PDBS,
    resources.NETWORK_POLICIES,
    resources.CONTROLLER_REVISIONS,
    resources.ADAPTERS,
)
"""Kinds that are rendered and that every API server with our CRDs serves."""

OPTIONAL_CHILDREN: tuple[Resource, ...] = (
    resources.LEADER_WORKER_SETS,
    resources.INFERENCE_POOLS,
    resources.HTTP_ROUTES,
    resources.POD_MONITORS,
)
"""Kinds that are rendered where they are served."""

_SPEC_OF = {"Deployment", "LeaderWorkerSet", "DynamoGraphDeploymentScalingAdapter"}


# --- what is worth its memory


def child(item: Json) -> Json:
    """A child without what no decision needs: others' field records, specs of passive objects."""
    kind = item["kind"]
    cut: Json = {"apiVersion": item["apiVersion"], "kind": kind, "metadata": _metadata(item)}
    if kind in _SPEC_OF:
        cut["spec"] = _workload_spec(item.get("spec") or {})
        if "status" in item:
            cut["status"] = item["status"]
    elif kind == "ControllerRevision":
        cut["revision"] = item.get("revision", 0)
        cut["data"] = revisions.packed(item.get("data"))
    elif kind in ("InferencePool", "HTTPRoute") and "status" in item:
        cut["status"] = item["status"]
    return cut


def _metadata(item: Json) -> Json:
    metadata: Json = dict(item["metadata"])
    managed = metadata.pop("managedFields", None) or ()
    kept = [
        entry
        for entry in managed
        if str(entry.get("manager", "")).startswith(FIELD_MANAGER)
        or entry.get("subresource") == "scale"
    ]
    if kept:
        metadata["managedFields"] = kept
    return metadata


def _workload_spec(spec: Json) -> Json:
    """Without the pods' specs: only their labels and annotations decide anything."""
    cut = dict(spec)
    if "template" in cut:
        cut["template"] = {"metadata": (cut["template"] or {}).get("metadata") or {}}
    group = cut.get("leaderWorkerTemplate")
    if isinstance(group, dict):
        cut["leaderWorkerTemplate"] = {
            key: {"metadata": (value or {}).get("metadata") or {}}
            if key in ("leaderTemplate", "workerTemplate")
            else value
            for key, value in group.items()
        }
    return cut


_OF_CONTAINER = ("name", "image", "resources", "restartPolicy")


def pod(item: Json) -> Json:
    """A pod's identity, what it asks for and its status."""
    metadata = {key: value for key, value in item["metadata"].items() if key != "managedFields"}
    spec = item.get("spec") or {}
    kept = ("nodeName", "schedulingGates", "volumes")
    cut = {key: spec[key] for key in kept if key in spec}
    for key in ("containers", "initContainers"):
        if key in spec:
            cut[key] = [
                {field: container[field] for field in _OF_CONTAINER if field in container}
                for container in spec[key]
            ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": cut,
        "status": item.get("status") or {},
    }


def graph(item: Json) -> Json:
    """A graph without who wrote it, and without the copy of it that kubectl keeps."""
    metadata = {key: value for key, value in item["metadata"].items() if key != "managedFields"}
    if LAST_APPLIED in (annotations := metadata.get("annotations") or {}):
        metadata["annotations"] = {k: v for k, v in annotations.items() if k != LAST_APPLIED}
    return {**item, "metadata": metadata}


LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def docker_secret(item: Json) -> Json:
    """Which registries a docker Secret is for. What it holds is not kept for a moment longer."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {key: item["metadata"][key] for key in ("name", "namespace")},
        "registries": registries(item),
    }


def registries(secret: Json) -> list[str]:
    """Registry hosts of a `kubernetes.io/dockerconfigjson` Secret, sorted."""
    try:
        config = json.loads(base64.b64decode((secret.get("data") or {})[".dockerconfigjson"]))
        hosts = config.get("auths") or {}
        return sorted(str(host) for host in hosts)
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError):
        return []


# --- by graph

GONE_KEPT = 4096


@dataclass(slots=True)
class _Family:
    """A graph and all objects of its name: that it owns, or that have its label."""

    graph: Json | None = None
    children: dict[Key, Json] = field(default_factory=dict)
    pods: dict[str, Json] = field(default_factory=dict)  # by name


class GraphIndex:
    """Everything that belongs to graphs, by namespace and name of the graph.

    `on_due` is called with the key of each graph of which something changed, and whether that was
    the graph itself: what its author wants, not what became of it.
    """

    def __init__(self, on_due: Callable[[GraphKey, bool], None]) -> None:
        self._families: dict[Place, _Family] = {}
        self._on_due = on_due
        # Answers to our own writes that the caches may not show yet, by the graph they are of:
        # object -> the answer, or, for a deleted one, its uid.
        self._ahead: dict[Place, dict[Key, Json | str]] = {}
        self._graphs_ahead: dict[GraphKey, Json] = {}
        # The last version of objects that have gone, oldest first: an answer may come after that.
        self._gone: dict[tuple[str, Key], int] = {}

    # called by informers

    def graph_changed(self, old: Json | None, new: Json | None) -> None:
        item = new or old
        assert item is not None
        metadata = item["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        place = namespace, names.bounded(name)
        family = self._families.setdefault(place, _Family())
        family.graph = new
        self._tidy(place, family)
        if old is None or new is None or _wish(old) != _wish(new):
            self._on_due((namespace, name), True)

    def child_changed(self, old: Json | None, new: Json | None) -> None:
        self._changed(old, new, pods=False)

    def pod_changed(self, old: Json | None, new: Json | None) -> None:
        self._changed(old, new, pods=True)

    def _changed(self, old: Json | None, new: Json | None, *, pods: bool) -> None:
        """An object may also change its label, and so its graph."""
        for item in (old, new):
            if item is None:
                continue
            place = _place(item)
            if place is None:
                continue
            family = self._families.setdefault(place, _Family())
            name = item["metadata"]["name"]
            if pods:
                family.pods.pop(name, None)
                if item is new and new is not None:
                    family.pods[name] = new
            else:
                key = item["kind"], name
                family.children.pop(key, None)
                if item is new and new is not None:
                    family.children[key] = new
                self._caught_up(place, key, old, new)
            owner = family.graph
            self._tidy(place, family)
            if owner is not None:
                self._on_due((owner["metadata"]["namespace"], owner["metadata"]["name"]), False)

    def _tidy(self, place: Place, family: _Family) -> None:
        if family.graph is None and not family.children and not family.pods:
            self._families.pop(place, None)

    # our own writes

    def wrote(self, item: Json) -> None:
        """The API server's answer to a write: the object as it is since then."""
        place = _place(item)
        if place is None:
            return
        key = item["kind"], item["metadata"]["name"]
        family = self._families.get(place)
        cached = family.children.get(key) if family is not None else None
        seen = _version(cached) if cached is not None else self._gone.get((place[0], key), 0)
        if seen < _version(item):
            self._ahead.setdefault(place, {})[key] = child(item)

    def wrote_graph(self, item: Json) -> None:
        """The API server's answer to a write of a graph's status."""
        metadata = item["metadata"]
        self._graphs_ahead[metadata["namespace"], metadata["name"]] = graph(item)

    def deleted(self, item: Json) -> None:
        """This object was told to go."""
        place = _place(item)
        if place is not None:
            key = item["kind"], item["metadata"]["name"]
            self._ahead.setdefault(place, {})[key] = item["metadata"]["uid"]

    def listed(self, kind: str, namespace: str | None, version: str) -> None:
        """The cache of a kind was listed anew, as it was at `version` (in one namespace, or all):
        what it lacks has gone in a moment in which nobody watched."""
        limit = int(version) if version.isdigit() else 0
        for place, ahead in list(self._ahead.items()):
            if namespace is not None and place[0] != namespace:
                continue
            for key, item in list(ahead.items()):
                if key[0] == kind and (isinstance(item, str) or _version(item) <= limit):
                    self._drop(place, key)
                    family = self._families.get(place)
                    if family is not None and family.graph is not None:
                        self._on_due((place[0], family.graph["metadata"]["name"]), False)

    def _drop(self, place: Place, key: Key) -> None:
        ahead = self._ahead.get(place, {})
        ahead.pop(key, None)
        if not ahead:
            self._ahead.pop(place, None)

    def _caught_up(self, place: Place, key: Key, old: Json | None, new: Json | None) -> None:
        """The cache went from `old` to `new`: does it show our own write by now?"""
        if new is None and old is not None:
            self._gone.pop((place[0], key), None)
            self._gone[place[0], key] = _version(old)
            if len(self._gone) > GONE_KEPT:
                del self._gone[next(iter(self._gone))]
        ahead = self._ahead.get(place, {}).get(key)
        if ahead is None:
            return
        if isinstance(ahead, str):
            shown = new is None or new["metadata"]["uid"] != ahead
        elif new is not None:
            shown = _version(new) >= _version(ahead)
        else:
            shown = old is not None and old["metadata"]["uid"] == ahead["metadata"]["uid"]
        if shown:
            self._drop(place, key)

    # called by reconciles

    @property
    def graphs(self) -> Iterable[Json]:
        return [f.graph for f in self._families.values() if f.graph is not None]

    def raw(self, key: GraphKey) -> Json | None:
        """The graph, as the API server was last seen to have it; None if there is none."""
        family = self._families.get((key[0], names.bounded(key[1])))
        found = family.graph if family is not None else None
        ahead = self._graphs_ahead.get(key)
        if ahead is not None:
            if (
                found is not None
                and found["metadata"]["uid"] == ahead["metadata"]["uid"]
                and _version(found) < _version(ahead)
            ):
                return ahead
            del self._graphs_ahead[key]
        return found if found is not None and found["metadata"]["name"] == key[1] else None

    def observe(self, raw: Json, apis: frozenset[str], at: datetime | None = None) -> Observed:
        """Everything of the graph `raw`. Raises pydantic's `ValidationError` if it is none."""
        metadata = raw["metadata"]
        place = metadata["namespace"], names.bounded(metadata["name"])
        family = self._families.get(place, _Family())
        ahead = self._ahead.get(place, {})
        children: dict[Key, Json] = {}
        for key, item in (*family.children.items(), *ahead.items()):
            newer = ahead.get(key, item)
            if isinstance(newer, str):
                if isinstance(item, str) or item["metadata"]["uid"] == newer:
                    continue
                newer = item
            if _owned_by(newer, metadata["uid"]) or is_left_behind(newer):
                children[key] = newer
        return Observed(
            graph=parsed(raw),
            raw=raw,
            children=children,
            pods=tuple(family.pods[name] for name in sorted(family.pods)),
            apis=apis,
            at=at,
        )

    def forget(self, namespace: str, name: str) -> None:
        """The graph of that name is gone; so is what was written for it."""
        self._ahead.pop((namespace, names.bounded(name)), None)


def _wish(item: Json) -> Any:
    """What a graph's author wants: all but the status and what comes with each write."""
    metadata = item["metadata"]
    fields = ("uid", "generation", "deletionTimestamp", "labels", "annotations")
    return [metadata.get(field) for field in fields]


def parsed(raw: Json) -> DynamoGraphDeployment:
    """The graph as a model. Raises pydantic's `ValidationError`."""
    return DynamoGraphDeployment.model_validate(
        {key: raw[key] for key in ("apiVersion", "kind", "metadata", "spec") if key in raw}
    )


def _place(item: Json) -> Place | None:
    """The graph that an object is of: its owner, whatever has become of its label; for pods, and
    what nobody owns, the label tells."""
    metadata = item["metadata"]
    for owner in metadata.get("ownerReferences") or ():
        if owner.get("kind") == resources.GRAPHS.kind:
            return metadata["namespace"], names.bounded(owner["name"])
    label = (metadata.get("labels") or {}).get(names.GRAPH_LABEL)
    return None if label is None else (metadata["namespace"], label)


def _owned_by(item: Json, uid: str) -> bool:
    owners: Any = item["metadata"].get("ownerReferences") or ()
    return any(owner.get("uid") == uid for owner in owners)


def _version(item: Json) -> int:
    """resourceVersions of one kind compare as numbers (guaranteed since Kubernetes 1.35)."""
    text = str(item["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0


__all__ = ["CHILDREN", "OPTIONAL_CHILDREN", "GraphIndex", "GraphKey", "ValidationError"]
