"""Who carries orders out."""

from dynamo_planner.connectors.local import LocalScaleApi as LocalScaleApi
from dynamo_planner.connectors.scale import Connector as Connector
from dynamo_planner.connectors.scale import InvalidComponents as InvalidComponents
from dynamo_planner.connectors.scale import Scalable as Scalable
from dynamo_planner.connectors.scale import ScaleConnector as ScaleConnector
from dynamo_planner.connectors.scale import scalables as scalables
