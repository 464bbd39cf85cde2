"""What a graph with prefill and decode workers has beyond others: a secret that they share.

A picker names the prefill worker of a request in a header, and a decode worker follows it only with
a signature that the graph's own processes can make. The Secret is rendered without its content,
because rendering is pure: whoever applies it makes the content, once (`PAIRING_SECRET_KEY`, at
least 16 bytes). Pods start without it too, and say that they can't pair.
"""

from collections.abc import Sequence

from dynamo_operator.render import deployments, environment, names
from dynamo_operator.render.merge import Json
from dynamo_operator.render.parts import Graph, Part
from dynamo_operator.render.runtimes import Family

SECRET_VARIABLE = "DYN_PD_SECRET"
FILE_VARIABLE = "DYN_PD_SECRET_FILE"


def secret(parts: Sequence[Part], graph: Graph) -> Json | None:
    """The Secret; None for a graph that needs none."""
    if not deployments.generations_apart(parts):
        return None
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": graph.metadata(names.pairing_secret(graph.name), {}),
        "type": "Opaque",
    }


def give_secret(parts: Sequence[Part], graph: Graph) -> None:
    """Let the pods of pickers and of prefill and decode workers have it, where their author has not
    given one."""
    if not deployments.generations_apart(parts):
        return
    source = {
        "secretKeyRef": {
            "name": names.pairing_secret(graph.name),
            "key": names.PAIRING_SECRET_KEY,
            "optional": True,
        }
    }
    own = {SECRET_VARIABLE, FILE_VARIABLE}
    for part in parts:
        picks = part.kind in ("frontend", "epp") and part.family is not Family.FOREIGN
        pairs = part.role in ("prefill", "decode") and part.family is Family.LAUNCHER
        if picks or pairs:
            part.templates = {
                which: environment.with_variable(
                    template, {"name": SECRET_VARIABLE, "valueFrom": source}, own
                )
                for which, template in part.templates.items()
            }
