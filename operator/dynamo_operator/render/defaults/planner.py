"""The planner: no traffic of its own, a status server and metrics."""

from dynamo_operator.render.defaults.ports import Numbers, References, http_probe, port
from dynamo_operator.render.environment import variable
from dynamo_operator.render.merge import Json
from dynamo_operator.render.names import PLANNER_METRICS_PORT

GRACE_SECONDS = 60


def ports(numbers: Numbers) -> list[Json]:
    return [port("metrics", PLANNER_METRICS_PORT), port("system", numbers.system)]


def probes(numbers: Numbers, refer: References) -> Json:
    system = refer("system", numbers.system)
    return {
        "startupProbe": http_probe("/live", system, period=10, timeout=5, failures=720),
        "livenessProbe": http_probe("/live", system, period=10, timeout=5, failures=3),
        "readinessProbe": http_probe("/health", system, period=10, timeout=5, failures=3),
    }


def environment(numbers: Numbers) -> list[Json]:
    return [
        variable("PLANNER_PROMETHEUS_PORT", str(PLANNER_METRICS_PORT)),
        variable("DYN_SYSTEM_PORT", str(numbers.system)),
    ]
