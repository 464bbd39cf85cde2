"""Propose: how many replicas of a role would be right, by each loop for itself."""

from dynamo_planner.propose.load import propose_by_load as propose_by_load
from dynamo_planner.propose.proposal import Proposal as Proposal
from dynamo_planner.propose.sla import Estimate as Estimate
from dynamo_planner.propose.sla import propose_by_estimate as propose_by_estimate
from dynamo_planner.propose.sla import propose_by_prediction as propose_by_prediction
