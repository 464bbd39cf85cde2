"""Predict: from the traffic of past intervals to that of the next."""

from dynamo_planner.predict.forecast import Forecast as Forecast
from dynamo_planner.predict.forecast import forecast as forecast
from dynamo_planner.predict.history import MOST as MOST
from dynamo_planner.predict.history import Prediction as Prediction
from dynamo_planner.predict.history import Sample as Sample
from dynamo_planner.predict.history import predict as predict
from dynamo_planner.predict.trace import InvalidTrace as InvalidTrace
from dynamo_planner.predict.trace import warmup as warmup
