"""Performance models: how long an engine takes, and so how much one replica can do."""

from dynamo_planner.performance.capacity import Capacity as Capacity
from dynamo_planner.performance.capacity import capacity as capacity
from dynamo_planner.performance.choice import Chosen as Chosen
from dynamo_planner.performance.choice import choose_model as choose_model
from dynamo_planner.performance.live import Point as Point
from dynamo_planner.performance.live import point as point
from dynamo_planner.performance.model import Model as Model
from dynamo_planner.performance.model import ProfileModel as ProfileModel
from dynamo_planner.performance.profile import Profiles as Profiles
from dynamo_planner.performance.profile import load_profiles as load_profiles
