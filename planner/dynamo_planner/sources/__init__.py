"""Where readings come from."""

from dynamo_planner.sources.endpoints import Misconfigured as Misconfigured
from dynamo_planner.sources.endpoints import endpoint_source as endpoint_source
from dynamo_planner.sources.prometheus import Prometheus as Prometheus
from dynamo_planner.sources.prometheus import PrometheusSource as PrometheusSource
from dynamo_planner.sources.scrape import DirectScrape as DirectScrape
from dynamo_planner.sources.source import MetricsSource as MetricsSource
from dynamo_planner.sources.source import Pods as Pods
from dynamo_planner.sources.workers import Workers as Workers
