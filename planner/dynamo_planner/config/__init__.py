"""The planner's configuration: upstream's keys, checked, and what each of them does here."""

from dynamo_planner.config.load import GivenConfig as GivenConfig
from dynamo_planner.config.load import given_config as given_config
from dynamo_planner.config.model import ComponentLimits as ComponentLimits
from dynamo_planner.config.model import PlannerConfig as PlannerConfig
