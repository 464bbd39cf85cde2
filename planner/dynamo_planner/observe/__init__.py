"""Observe: from readings of workers to what is known of each role, and how well."""

from dynamo_planner.observe.observation import Observation as Observation
from dynamo_planner.observe.observation import RoleView as RoleView
from dynamo_planner.observe.observation import Seen as Seen
from dynamo_planner.observe.observation import WorkerLoad as WorkerLoad
from dynamo_planner.observe.observation import observe as observe
from dynamo_planner.observe.reading import Counters as Counters
from dynamo_planner.observe.reading import Reading as Reading
from dynamo_planner.observe.traffic import Traffic as Traffic
