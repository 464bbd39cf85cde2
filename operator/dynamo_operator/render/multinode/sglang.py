"""SGLang over several nodes: each process is told its rank and where the first one listens."""

from collections.abc import Mapping
from typing import Any

from dynamo_operator.render.multinode.commandline import CommandLine
from dynamo_operator.render.multinode.node import LEADER, RANK, Nodes

INIT_PORT = 29500


def nodes(main: Mapping[str, Any], line: CommandLine, count: int) -> Nodes:
    common = (("--dist-init-addr", f"{LEADER}:{INIT_PORT}"), ("--nnodes", str(count)))
    leader = line.adding(*common, ("--node-rank", "0"))
    worker = line.adding(*common, ("--node-rank", RANK))
    return Nodes(leader.on(main), worker.on(main))
