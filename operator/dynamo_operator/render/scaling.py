"""What a graph's planner is told: which components it may scale, and by which adapters.

Its rights reach the scale of these adapters and nothing else, so it could not find out by itself.
"""

import json
from collections.abc import Sequence

from dynamo_crds.schema import is_quantity, quantity_number

from dynamo_operator.render import environment, names
from dynamo_operator.render.merge import Json, entries, mapping
from dynamo_operator.render.parts import Graph, Part

COMPONENTS_VARIABLE = "DYN_PLANNER_COMPONENTS"
GPU = "nvidia.com/gpu"


def tell_planners(parts: Sequence[Part], graph: Graph) -> None:
    """Name the components with a scaling adapter to every planner whose author has not."""
    scaled = [
        {
            "name": part.spec.name,
            "role": part.role,
            "adapter": names.adapter_name(graph.name, part.spec.name),
            "gpus": gpus(part),
        }
        for part in parts
        if part.is_worker and part.spec.scaling_adapter is not None
    ]
    if not scaled:
        return
    variable = environment.variable(COMPONENTS_VARIABLE, json.dumps(scaled))
    for part in parts:
        if part.kind == "planner":
            part.templates = {
                which: environment.with_variable(template, variable, {COMPONENTS_VARIABLE})
                for which, template in part.templates.items()
            }


def gpus(part: Part) -> int:
    """Of one replica, over all its pods and containers; 1 where none asks for any."""
    pods = {"pod": 1, "leader": 1, "worker": part.nodes - 1}
    found = sum(
        pods[which] * _limit(container)
        for which, template in part.templates.items()
        for container in entries(template["spec"].get("containers"))
    )
    return max(1, round(found))


def _limit(container: Json) -> float:
    value = mapping(mapping(mapping(container).get("resources")).get("limits")).get(GPU, 0)
    return quantity_number(value) if is_quantity(value) else 0.0
