"""Constrain: what the limits leave of it, and which component gets it."""

from dynamo_planner.constrain.constrain import Allocation as Allocation
from dynamo_planner.constrain.constrain import constrain as constrain
from dynamo_planner.constrain.feasible import infeasible as infeasible
