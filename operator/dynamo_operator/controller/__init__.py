"""The operator as a process: caches, leader lease, queue and status server around the reconcile.

What is decided is in `reconcile` and `status`; here is what is connected to what, and in which
order it starts and stops.
"""

from dynamo_operator.controller.process import run_operator
from dynamo_operator.controller.settings import OperatorSettings

__all__ = ["OperatorSettings", "run_operator"]
