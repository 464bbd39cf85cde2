"""Execute: what is to be told to whoever scales, and who else scales."""

from dynamo_planner.execute.orders import Applied as Applied
from dynamo_planner.execute.orders import Order as Order
from dynamo_planner.execute.orders import orders as orders
from dynamo_planner.execute.orders import others as others
from dynamo_planner.execute.orders import remembered as remembered
