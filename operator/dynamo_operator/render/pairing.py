"""What a graph with prefill and decode workers has beyond others: a secret that they share.

A picker names the prefill worker of a request in a header, and a decode worker follows it only with
a signature that the graph's own processes can make. The Secret is rendered without its content,
because rendering is pure: whoever applies it makes the content, once (`PAIRING_SECRET_KEY`, at
least 16 bytes). Pods wait for it: one that started without it could not pair for as long as it
lives.
"""

from collections.abc import Iterator, Mapping, Sequence

from dynamo_operator.render import deployments, environment, names
from dynamo_operator.render.merge import Json, entries, mapping
from dynamo_operator.render.parts import Graph, Part
from dynamo_operator.render.runtimes import Family

SECRET_VARIABLE = "DYN_PD_SECRET"
FILE_VARIABLE = "DYN_PD_SECRET_FILE"


def secrets(parts: Sequence[Part], graph: Graph) -> list[Json]:
    """The Secrets that the parts' pods have it from: one, none where nothing pairs, and another
    where templates of an earlier rendering know it by another name."""
    read = {name for part in parts for name in secrets_read(part.templates, graph.name)}
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": graph.metadata(name, {}),
            "type": "Opaque",
        }
        for name in sorted(read)
    ]


def give_secret(parts: Sequence[Part], graph: Graph) -> None:
    """Let the pods of pickers and of prefill and decode workers have it, where their author has not
    given one."""
    if not deployments.is_split(parts):
        return
    source = {
        "secretKeyRef": {
            "name": graph.pairing_secret or names.pairing_secret(graph.name, graph.uid),
            "key": names.PAIRING_SECRET_KEY,
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


def secrets_read(templates: Mapping[str, Json], graph: str) -> Iterator[str]:
    """Names of the graph's Secrets that a component's templates refer to, not of its author's."""
    ours = names.pairing_secret(graph, "")
    for template in templates.values():
        for container in entries(mapping(mapping(template).get("spec")).get("containers")):
            for entry in entries(mapping(container).get("env")):
                source = mapping(mapping(mapping(entry).get("valueFrom")).get("secretKeyRef"))
                name = source.get("name")
                if mapping(entry).get("name") != SECRET_VARIABLE or not isinstance(name, str):
                    continue
                if name == ours or name.startswith(f"{ours}-"):
                    yield name
