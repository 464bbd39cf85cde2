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
    # A gRPC probe takes a number only.
    check = {"grpc": {"port": GRPC_HEALTH_PORT}, "periodSeconds": 10, "timeoutSeconds": 5}
    return {
        "startupProbe": {**check, "failureThreshold": 180},
        "livenessProbe": {**check, "failureThreshold": 3},
        "readinessProbe": {**check, "periodSeconds": 5, "failureThreshold": 3},
    }


def environment(numbers: Numbers, pool: str) -> list[Json]:
    """``pool``: the graph's InferencePool, which objectives and rewrites refer to."""
    return [
        variable("DYN_SYSTEM_PORT", str(numbers.system)),
        variable("DYN_RULES_POOL", pool),
    ]
