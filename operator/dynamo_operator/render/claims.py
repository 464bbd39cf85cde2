"""PersistentVolumeClaims that a graph written in v1alpha1 asks to have made (`pvcs`)."""

from dynamo_crds.v1alpha1 import GraphSpec

from dynamo_operator.render.merge import Json
from dynamo_operator.render.parts import Graph


def claims(said: GraphSpec, graph: Graph) -> list[Json]:
    """One claim for each of `pvcs` with `create: true`."""
    found: list[Json] = []
    for wanted in said.pvcs:
        if not wanted.create:
            continue
        spec: Json = {"resources": {"requests": {"storage": str(wanted.size)}}}
        if wanted.volume_access_mode:
            spec["accessModes"] = [wanted.volume_access_mode]
        if wanted.storage_class:
            spec["storageClassName"] = wanted.storage_class
        found.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": graph.metadata(wanted.name, {}),
                "spec": spec,
            }
        )
    return found
