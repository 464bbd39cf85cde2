"""Measuring a live engine: the timing profile that planner and simulated engine read."""

from dynamo_planner.profiling.engine import HttpEngine as HttpEngine
from dynamo_planner.profiling.engine import ProfilingFailed as ProfilingFailed
from dynamo_planner.profiling.fit import profile_of as profile_of
from dynamo_planner.profiling.measure import Answer as Answer
from dynamo_planner.profiling.measure import Asked as Asked
from dynamo_planner.profiling.measure import Plan as Plan
from dynamo_planner.profiling.measure import measure as measure
