"""The picker behind a Gateway: ext_proc and health over gRPC, and a status server."""

from dynamo_operator.render.defaults.ports import Numbers, References, port
from dynamo_operator.render.environment import variable
from dynamo_operator.render.merge import Json
from dynamo_operator.render.names import EXT_PROC_PORT, GRPC_HEALTH_PORT

CONFIG_VOLUME = "epp-config"
CONFIG_FOLDER = "/etc/dynamo/epp"
CONFIG_FILE = "config.yaml"


def ports(numbers: Numbers) -> list[Json]:
    return [
        port("grpc", EXT_PROC_PORT),
        port("grpc-health", GRPC_HEALTH_PORT),
        port("system", numbers.system),
    ]


def probes(numbers: Numbers, refer: References) -> Json:
    # A gRPC probe takes a number only. The service "" follows readiness, and a picker that waits
    # for its pool is not to be restarted. Times are those of frontends, for the same reasons.
    alive = {"grpc": {"port": GRPC_HEALTH_PORT, "service": "liveness"}}
    ready = {"grpc": {"port": GRPC_HEALTH_PORT}}
    return {
        "startupProbe": _probe(alive, period=2, timeout=2, failures=150),
        "livenessProbe": _probe(alive, period=10, timeout=10, failures=6),
        "readinessProbe": _probe(ready, period=2, timeout=5, failures=6),
    }


def _probe(check: Json, *, period: int, timeout: int, failures: int) -> Json:
    return {
        **check,
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }


def environment(numbers: Numbers, pool: str) -> list[Json]:
    """``pool``: the graph's InferencePool, which objectives and rewrites refer to."""
    return [
        variable("DYN_SYSTEM_PORT", str(numbers.system)),
        variable("DYN_RULES_POOL", pool),
    ]
