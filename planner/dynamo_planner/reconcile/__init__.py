"""Reconcile: one number for a role out of what the loops propose, and patience."""

from dynamo_planner.reconcile.memory import RoleMemory as RoleMemory
from dynamo_planner.reconcile.reconcile import Verdict as Verdict
from dynamo_planner.reconcile.reconcile import reconcile as reconcile
