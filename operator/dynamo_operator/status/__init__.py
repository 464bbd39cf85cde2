"""What a graph's status says: pure functions from what is observed to what people read.

`graph_status` and `adapter_status` give the statuses, `events` the Kubernetes Events between two of
them. Nothing here does I/O; the clock is an argument and only dates changes.
"""

from dynamo_operator.status.adapters import adapter_status
from dynamo_operator.status.events import EventText, events
from dynamo_operator.status.status import graph_status

__all__ = ["EventText", "adapter_status", "events", "graph_status"]
