"""What a process of a group knows of its place in it: variables that the controller sets."""

from dataclasses import dataclass, field
from typing import Any

from dynamo_operator.render.environment import variable
from dynamo_operator.render.merge import Json

LEADER = "$(LWS_LEADER_ADDRESS)"
RANK = "$(LWS_WORKER_INDEX)"
"""0 on the leader's node. Kubernetes expands both in commands, arguments and later variables."""

LEADER_IN_SHELL = "$LWS_LEADER_ADDRESS"
RANK_IN_SHELL = "LWS_WORKER_INDEX"
"""As a shell reads them, the latter inside of `$((…))`."""

ALIASES = (variable("DYNAMO_RANK", RANK), variable("DYNAMO_LEADER_ADDRESS", LEADER))
"""Dynamo's names for them, the same whatever runs the group; an author can't change them."""


@dataclass(slots=True)
class Nodes:
    """What the two kinds of nodes of one engine run."""

    leader: Json
    """Main container of the first node."""
    worker: Json
    """Main container of each other node."""
    every_node_serves: bool = False
    """Whether each node has an HTTP server of its own, so that requests may come to it."""
    worker_ready: Json | None = None
    """Readiness probe of a node without HTTP server, if it can tell."""
    wait_for: int | None = None
    """Port of the leader that the others wait for before they start."""
    volumes: list[dict[str, Any]] = field(default_factory=list)
    """Volumes of all nodes' pods."""
