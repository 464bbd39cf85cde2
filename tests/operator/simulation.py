"""A namespace in memory: what the API server and its controllers make of a plan.

Just enough of Kubernetes to see where planning leads: server-side apply with field ownership,
Deployments whose pods become ready (or fail), garbage collection. The real API server judges the
same code in e2e; here thousands of histories can be tried.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

from dynamo_operator.reconcile.apply import SEED_MANAGER
from dynamo_operator.reconcile.gather import parsed
from dynamo_operator.reconcile.observed import Json, Key, Observed
from dynamo_operator.reconcile.ownership import FIELD_MANAGER, ROLLOUT_MANAGER, is_applied
from dynamo_operator.reconcile.plan import Plan
from dynamo_operator.reconcile.planning import ADAPTER, WORKLOADS, plan
from dynamo_operator.render import Platform, names

_KEYED = {
    "containers": ("name",),
    "env": ("name",),
    "ports": ("containerPort", "port"),
    "volumes": ("name",),
}


def fields(value: Any) -> Json:
    """`FieldsV1` of a manifest's fields."""
    result: Json = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            result[f"f:{key}"] = fields(item)
        elif isinstance(item, list) and key in _KEYED and all(isinstance(i, dict) for i in item):
            node: Json = {}
            for entry in item:
                name = next(k for k in _KEYED[key] if k in entry)
                node[f"k:{json.dumps({name: entry[name]})}"] = {".": {}, **fields(entry)}
            result[f"f:{key}"] = node
        else:
            result[f"f:{key}"] = {}
    return result


def template(workload: Json) -> Json:
    """The template of a workload's pods; of a group's leader."""
    spec = workload["spec"]
    found: Json = spec["template"] if "template" in spec else spec["leaderWorkerTemplate"]
    return found.get("leaderTemplate", found)


def _groups(name: str, workload: Json) -> list[Json]:
    """The pods of a LeaderWorkerSet, all ready."""
    group = workload["spec"]["leaderWorkerTemplate"]
    return [
        {
            "metadata": {
                "name": f"{name}-{number}-{node}",
                "labels": {
                    **group["workerTemplate" if node else "leaderTemplate"]["metadata"]["labels"],
                    names.GROUPS_LABEL: name,
                    names.NODE_LABEL: str(node),
                },
            },
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }
        for number in range(workload["spec"].get("replicas", 1))
        for node in range(group["size"])
    ]


class Namespace:
    """One graph in one namespace. Pods of a template for which `works` is false never get ready."""

    def __init__(self, graph: Json, works: Callable[[Json], bool] = lambda template: True) -> None:
        self.works = works
        self.platform = Platform(namespace="team", apis=frozenset({names.LEADER_WORKER_SET}))
        self.children: dict[Key, Json] = {}
        self.writes = 0
        self._versions = itertools.count(1)
        self._uids = itertools.count(1)
        self.graph: Json = {
            "apiVersion": "nvidia.com/v1beta1",
            "kind": "DynamoGraphDeployment",
            "metadata": {"name": "g", "namespace": "team", "uid": "graph", "generation": 1},
            "spec": graph,
        }

    # --- what people and controllers do

    def edit(self, change: Callable[[Json], None]) -> None:
        """Change the graph's spec; its status is about an earlier generation then."""
        spec = copy.deepcopy(self.graph["spec"])
        change(spec)
        metadata = {**self.graph["metadata"]}
        if spec != self.graph["spec"]:
            metadata["generation"] += 1
        self.graph = {**self.graph, "metadata": metadata, "spec": spec}

    def annotate(self, name: str, value: str) -> None:
        metadata = self.graph["metadata"]
        metadata["annotations"] = {**metadata.get("annotations", {}), name: value}

    def component(self, name: str) -> Json:
        found: Json = next(c for c in self.graph["spec"]["components"] if c["name"] == name)
        return found

    def workloads(self, component: str) -> list[Json]:
        return [
            child
            for (kind, _), child in sorted(self.children.items())
            if kind in WORKLOADS and child["metadata"]["labels"][names.COMPONENT_LABEL] == component
        ]

    def adapter(self, component: str) -> Json | None:
        return self.children.get((ADAPTER, names.adapter_name("g", component)))

    def scale(self, component: str, replicas: int) -> None:
        """As `kubectl scale dgdsa/…` or an autoscaler does."""
        adapter = self.adapter(component)
        assert adapter is not None
        adapter["spec"]["replicas"] = replicas

    # --- what is observed

    def observed(self) -> Observed:
        return Observed(
            graph=parsed(self.graph),
            raw=self.graph,
            children=dict(self.children),
            pods=tuple(self._pods()),
            apis=self.platform.apis,
        )

    def _pods(self) -> list[Json]:
        """One broken pod for each workload that can't work, and all of working groups; the others
        decide nothing here."""
        found = []
        for (kind, name), child in self.children.items():
            if kind == "LeaderWorkerSet" and self.works(template(child)):
                found += _groups(name, child)
            elif kind in WORKLOADS and not self.works(template(child)):
                waiting = {"reason": "ImagePullBackOff", "message": "not found"}
                status = {"name": "main", "state": {"waiting": waiting}, "restartCount": 0}
                found.append(
                    {
                        "metadata": {
                            "name": f"{name}-x",
                            "labels": template(child)["metadata"]["labels"],
                        },
                        "status": {"containerStatuses": [status]},
                    }
                )
        return found

    # --- time goes on

    def reconcile(self) -> Plan:
        """Plan once and carry the plan out; `writes` counts."""
        wanted = plan(self.observed(), self.platform)
        for manifest in wanted.manifests:
            self._apply(manifest, wanted)
        for key, number in wanted.scale.items():
            self._own_number(self.children[key], number, ROLLOUT_MANAGER)
            self.writes += 1
        for key in wanted.delete:
            del self.children[key]
            self.writes += 1
        return wanted

    def settle(self, turns: int = 60) -> Plan:
        """Until nothing changes any more. Raises if that never happens."""
        for _ in range(turns):
            before = self.writes
            wanted = self.reconcile()
            self.controllers()
            after = json.dumps([*self.children.values(), self.graph], sort_keys=True)
            if self.writes == before and after == getattr(self, "_last", None):
                return wanted
            self._last = after
        raise AssertionError("the operator never rests")

    def controllers(self) -> None:
        """Deployments come up; a graph whose workloads are all current is ready."""
        for (kind, _), child in self.children.items():
            if kind in WORKLOADS:
                number = child["spec"].get("replicas", 1)
                up = number if self.works(template(child)) else 0
                child["status"] = {
                    "observedGeneration": child["metadata"]["generation"],
                    "replicas": number,
                    "updatedReplicas": number,
                    "readyReplicas": up,
                    "availableReplicas": up,
                }
        wanted = plan(self.observed(), self.platform)
        ready = wanted.rollback is None and not any(c.old_workloads for c in wanted.components)
        for component in wanted.components:
            workload = self.children.get((component.workload_kind, component.workload))
            status = (workload or {}).get("status") or {}
            ready = ready and status.get("availableReplicas") == component.replicas
        self.graph["status"] = {
            "conditions": [
                {
                    "type": "Ready",
                    "status": str(ready),
                    "observedGeneration": self.graph["metadata"]["generation"],
                }
            ]
        }

    # --- the API server

    def _apply(self, manifest: Json, wanted: Plan) -> None:
        key = manifest["kind"], manifest["metadata"]["name"]
        live = self.children.get(key)
        if is_applied(manifest, live):
            return
        self.writes += 1
        new = copy.deepcopy(manifest)
        metadata = new["metadata"]
        if live is None:
            metadata["uid"], metadata["generation"] = f"uid-{next(self._uids)}", 1
            if key[0] == ADAPTER:
                new["spec"]["replicas"] = wanted.seeds[key]
        else:
            metadata["uid"] = live["metadata"]["uid"]
            metadata["generation"] = live["metadata"]["generation"]
            if key[0] == ADAPTER:
                new["spec"]["replicas"] = live["spec"]["replicas"]
            elif key[0] == "ControllerRevision":
                assert new["data"] == live["data"], "a revision's data never changes"
            elif key[0] in WORKLOADS:
                assert new["spec"].get("selector") == live["spec"].get("selector"), "immutable"
                if "replicas" not in new["spec"]:
                    new["spec"]["replicas"] = live["spec"].get("replicas", 1)
            if new.get("spec") != live.get("spec"):
                metadata["generation"] += 1
            if "status" in live:
                new["status"] = live["status"]
        owned = {k: v for k, v in fields(manifest).items() if k not in ("f:apiVersion", "f:kind")}
        others = [
            entry
            for entry in (live or {}).get("metadata", {}).get("managedFields", ())
            if entry["manager"] not in (FIELD_MANAGER, ROLLOUT_MANAGER)
        ]
        number = manifest.get("spec", {}).get("replicas")
        if live is not None and number not in (None, live.get("spec", {}).get("replicas")):
            for entry in others:  # forced: whoever wrote another value owns it no more
                entry["fieldsV1"].get("f:spec", {}).pop("f:replicas", None)
        metadata["managedFields"] = [
            *others,
            {"manager": FIELD_MANAGER, "operation": "Apply", "fieldsV1": owned},
        ]
        metadata["resourceVersion"] = str(next(self._versions))
        self.children[key] = new

    def _own_number(self, item: Json, number: int, manager: str, subresource: str = "") -> None:
        """Another manager sets the replicas: ours loses the field."""
        item["spec"]["replicas"] = number
        item["metadata"]["generation"] += 1
        entries = item["metadata"]["managedFields"]
        for entry in entries:
            entry["fieldsV1"].get("f:spec", {}).pop("f:replicas", None)
        entries.append(
            {
                "manager": manager,
                "operation": "Update",
                "subresource": subresource,
                "fieldsV1": {"f:spec": {"f:replicas": {}}},
            }
        )

    def autoscale(self, component: str, number: int) -> None:
        """A HorizontalPodAutoscaler that addresses the Deployment itself."""
        (workload,) = self.workloads(component)
        self._own_number(workload, number, "kube-controller-manager", "scale")

    def kubectl_scale(self, component: str, number: int) -> None:
        (workload,) = self.workloads(component)
        self._own_number(workload, number, "kubectl", "scale")


__all__ = ["SEED_MANAGER", "Namespace", "fields"]
