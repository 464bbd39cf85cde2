"""vLLM over several nodes: one engine by torch.distributed or Ray, or data parallel ranks.

What the sizes in the command line ask for decides: an engine (tensor × pipeline parallel) larger
than a node is spread over them; several engines (data parallel) are dealt out to them. The launcher
runs where requests arrive, which is on the leader's node only for a spread engine; the other nodes
are plain headless vLLM.
"""

from collections.abc import Mapping
from typing import Any

from dynamo_operator.render import flags, notes
from dynamo_operator.render.environment import field
from dynamo_operator.render.merge import Json, entries
from dynamo_operator.render.multinode.commandline import CommandLine
from dynamo_operator.render.multinode.node import LEADER, RANK, RANK_IN_SHELL, Nodes
from dynamo_operator.render.notes import Notes
from dynamo_operator.render.shell import Word

MASTER_PORT = 29500
RAY_PORT = 6379
DATA_PARALLEL_PORT = 13445
_TENSOR = ("--tensor-parallel-size", "-tp")
_PIPELINE = ("--pipeline-parallel-size", "-pp")
_DATA = ("--data-parallel-size", "-dp")
_LAUNCHER = ["dynamo", "worker", "vllm"]


def nodes(
    component: str,
    main: Mapping[str, Any],
    line: CommandLine,
    count: int,
    gpus: int,
    executor: str,
    noted: Notes,
) -> Nodes:
    """`count` nodes with `gpus` GPUs each (0: it says nothing of GPUs)."""
    engine = line.number(*_TENSOR) * line.number(*_PIPELINE)
    ranks = line.number(*_DATA)
    if engine > (gpus or 1):
        return _ray(main, line) if executor == "ray" else _distributed(main, line, count)
    if engine * ranks > (gpus or 1):
        return _data_parallel(component, main, line, max(1, gpus // engine), noted)
    noted.add(
        component,
        notes.MULTINODE_FITS_ONE_NODE,
        "the sizes in its command fit one node, so every node runs an engine of its own",
    )
    return Nodes(dict(main), dict(main), every_node_serves=True)


def _distributed(main: Mapping[str, Any], line: CommandLine, count: int) -> Nodes:
    common = (
        ("--distributed-executor-backend", "mp"),
        ("--nnodes", str(count)),
        ("--master-addr", LEADER),
        ("--master-port", str(MASTER_PORT)),
    )
    leader = line.adding(*common, ("--node-rank", "0"))
    worker = _headless(line).adding(*common, ("--node-rank", RANK), ("--headless",))
    return Nodes(
        _with_side_channel(leader.on(main)),
        _with_side_channel(worker.on(main)),
        wait_for=MASTER_PORT,
    )


def _headless(line: CommandLine) -> CommandLine:
    """The command of a node without HTTP server. Only `vllm serve` knows `--headless`, and its
    model is a positional argument."""
    program = [word.raw for word in line.program]
    launcher = program == _LAUNCHER
    if not launcher and program[-1:] != ["vllm.entrypoints.openai.api_server"]:
        return line
    words = flags.translate(line.words, flags.VLLM).words if launcher else list(line.words)
    model: list[Word] = []
    rest: list[Word] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word.raw == "--model" and position < len(words):
            model = [words[position]]
            position += 1
        elif word.raw.startswith("--model="):
            given = word.raw.partition("=")[2]
            model = [Word(given, None if word.value is None else given)]
        else:
            rest.append(word)
    return line.running(["vllm", "serve"], [*model, *rest])


def _with_side_channel(main: Json) -> Json:
    """`main` with the address at which NIXL of each node is found by its peers."""
    name = "VLLM_NIXL_SIDE_CHANNEL_HOST"
    env = entries(main.get("env"))
    if all(entry.get("name") != name for entry in env):
        env = [*env, field(name, "status.podIP")]
    return {**main, "env": env}


def _ray(main: Mapping[str, Any], line: CommandLine) -> Nodes:
    leader = line.adding(("--distributed-executor-backend", "ray"))
    head = leader.after(f"ray start --head --port={RAY_PORT}")
    join = f"exec ray start --address={LEADER}:{RAY_PORT} --block"
    worker = {**main, "command": ["/bin/sh", "-c"], "args": [join]}
    return Nodes(head.on(main), worker, wait_for=RAY_PORT)


def _data_parallel(
    component: str, main: Mapping[str, Any], line: CommandLine, local: int, noted: Notes
) -> Nodes:
    """`local` ranks on each node, each node with its own server."""
    if [word.raw for word in line.program] == _LAUNCHER:
        message = (
            "data parallel ranks over several nodes: a worker of this platform is one rank; use"
            " replicas, or `vllm serve`"
        )
        noted.add(component, notes.RUNTIME_UNSUPPORTED, message)

    def ranks(first: str) -> tuple[tuple[str, ...], ...]:
        return (
            ("--data-parallel-hybrid-lb",),
            ("--data-parallel-size-local", str(local)),
            ("--data-parallel-start-rank", first),
            ("--data-parallel-address", LEADER),
            ("--data-parallel-rpc-port", str(DATA_PARALLEL_PORT)),
        )

    worker = line.in_shell().adding(*ranks(f"$(({local}*{RANK_IN_SHELL}))"))
    return Nodes(line.adding(*ranks("0")).on(main), worker.on(main), every_node_serves=True)
