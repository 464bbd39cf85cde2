"""The pod templates of a group, from the one that the author wrote for all of its nodes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_crds.v1beta1 import Component

from dynamo_operator.render import names, notes
from dynamo_operator.render.merge import Json, entries, mapping
from dynamo_operator.render.multinode import sglang, trtllm, vllm
from dynamo_operator.render.multinode.commandline import CommandLine
from dynamo_operator.render.multinode.node import LEADER, Nodes
from dynamo_operator.render.notes import Notes

_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_ENGINES = (
    ("simulator", re.compile(r"\bdynamo\s+worker\s+sim\b|\bdynamo\.mocker\b")),
    ("vllm", re.compile(r"\bdynamo\s+worker\s+vllm\b|\bdynamo\.vllm\b|\bvllm\s+serve\b")),
    ("sglang", re.compile(r"\bsglang\b")),
    ("trtllm", re.compile(r"\btrtllm\b|\btensorrt[-_]?llm\b")),
    ("vllm", re.compile(r"\bvllm\b")),
)
MAIN = "main"
WAIT = "wait-for-leader"
_WAIT_SCRIPT = """\
import socket, sys, time
address = sys.argv[1], int(sys.argv[2])
while True:
    try:
        socket.create_connection(address, timeout=2).close()
        break
    except OSError as error:
        print(f"{address[0]}:{address[1]}: {error}", flush=True)
        time.sleep(2)
"""


@dataclass(frozen=True, slots=True)
class Group:
    """A group's pod templates."""

    templates: Mapping[str, Json]
    """"leader" and "worker"."""
    every_node_serves: bool
    """Whether requests may come to every node, not only to the leader's."""


def split(
    component: Component,
    template: Json,
    main: Mapping[str, Any],
    executor: str,
    backend: str | None,
    noted: Notes,
) -> Group:
    """The templates of a group of `component`'s nodes. `main` is the main container in `template`;
    `executor` ("mp", "ray", "" for the default) spreads vLLM; `backend` names the engine where the
    command doesn't."""
    count = component.multinode.node_count if component.multinode is not None else 1
    nodes = _nodes(component.name, main, count, executor, backend, noted)
    leader = _template(template, main, nodes.leader, nodes)
    worker = _template(template, main, nodes.worker, nodes)
    if not nodes.every_node_serves:
        _silence(worker, nodes.worker_ready)
    if nodes.wait_for is not None:
        wait = _wait(nodes.leader, nodes.wait_for)
        worker["spec"]["initContainers"] = [*entries(worker["spec"].get("initContainers")), wait]
    return Group({"leader": leader, "worker": worker}, nodes.every_node_serves)


def _nodes(
    component: str,
    main: Mapping[str, Any],
    count: int,
    executor: str,
    backend: str | None,
    noted: Notes,
) -> Nodes:
    argv = [str(part) for key in ("command", "args") for part in entries(main.get(key))]
    text = " ".join([*argv, str(main.get("image", ""))])
    engine = next((name for name, found in _ENGINES if found.search(text)), backend)
    if engine == "simulator":
        return Nodes(dict(main), dict(main))
    line = CommandLine.of(main)
    if line is None or engine not in ("vllm", "sglang", "trtllm"):
        why = "no engine known here" if line is not None else "not surely its script's last command"
        message = f"several nodes: what runs is {why}; every node runs the same, with DYNAMO_RANK"
        noted.add(component, notes.RUNTIME_UNSUPPORTED, message)
        return Nodes(dict(main), dict(main))
    gpus = _gpus(main)
    if engine == "vllm":
        return vllm.nodes(component, main, line, count, gpus, executor, noted)
    if engine == "sglang":
        return sglang.nodes(main, line, count)
    return trtllm.nodes(component, main, line, count, gpus, noted)


def _gpus(main: Mapping[str, Any]) -> int:
    """GPUs of one container, whoever makes them; 0 if it asks for none."""
    resources = mapping(main.get("resources"))
    for amounts in (mapping(resources.get("limits")), mapping(resources.get("requests"))):
        for name, amount in amounts.items():
            if name.endswith("/gpu") and str(amount).isdigit():
                return int(amount)
    return 0


def _template(template: Json, main: Mapping[str, Any], node: Json, nodes: Nodes) -> Json:
    """`template` with `node` in the place of `main`; shares what is not changed."""
    spec = {**template["spec"]}
    spec["containers"] = [node if one is main else one for one in spec["containers"]]
    if nodes.volumes:
        spec["volumes"] = [*entries(spec.get("volumes")), *nodes.volumes]
    return {**template, "metadata": {**template["metadata"]}, "spec": spec}


def _silence(worker: Json, ready: Json | None) -> None:
    """Take from the template of a node without a server all that says it has one: probes, which
    would never succeed, and the labels by which pickers and Prometheus find pods."""
    hidden = (names.CLASS_LABEL, names.METRICS_LABEL, names.MODEL_LABEL)
    labels = worker["metadata"]["labels"]
    worker["metadata"]["labels"] = {k: v for k, v in labels.items() if k not in hidden}
    for position, container in enumerate(worker["spec"]["containers"]):
        if mapping(container).get("name") == MAIN:
            silent = {key: value for key, value in container.items() if key not in _PROBES}
            if ready is not None:
                silent["readinessProbe"] = ready
            worker["spec"]["containers"][position] = silent


def _wait(leader: Mapping[str, Any], port: int) -> Json:
    """An init container that ends when the leader listens: a node that started first would give
    up, and every restart in a group starts the whole group anew."""
    wait: Json = {
        "name": WAIT,
        "image": leader.get("image"),
        "command": ["python3", "-c", _WAIT_SCRIPT, LEADER, str(port)],
    }
    if "securityContext" in leader:
        wait["securityContext"] = leader["securityContext"]
    return wait
