"""Engines over several nodes: from one pod template to that of a group's leader and its workers.

The author writes one command line; each engine has its own flags that tell a process which node of
how many it is and where the first one listens. Ports and flags are those of Dynamo's operator.
"""

from dynamo_operator.render.multinode.split import Group, split

__all__ = ["Group", "split"]
