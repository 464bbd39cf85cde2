"""The frontend: Envoy and the picker in one container; it speaks HTTP and has a status server."""

from dynamo_operator.render.defaults.ports import Numbers, References, http_probe, port
from dynamo_operator.render.environment import variable
from dynamo_operator.render.merge import Json


def ports(numbers: Numbers) -> list[Json]:
    return [port("http", numbers.http), port("system", numbers.system)]


def probes(numbers: Numbers, refer: References) -> Json:
    http = refer("http", numbers.http)
    return {
        # Five minutes to start.
        "startupProbe": http_probe("/live", http, period=2, timeout=2, failures=150),
        # Probes wait in the same queue as requests. One that is short of CPU answers late; killed
        # or taken out for that, it would leave its load to the others, and so on.
        "livenessProbe": http_probe("/live", http, period=10, timeout=10, failures=6),
        "readinessProbe": http_probe("/health", http, period=2, timeout=5, failures=6),
    }


def environment(numbers: Numbers) -> list[Json]:
    return [
        variable("DYN_HTTP_PORT", str(numbers.http)),
        variable("DYN_SYSTEM_PORT", str(numbers.system)),
    ]


def foreign_environment(numbers: Numbers, dynamo_namespace: str) -> list[Json]:
    """What a frontend that is not ours reads beside that."""
    return [
        variable("DYNAMO_PORT", str(numbers.http)),
        variable("DYN_NAMESPACE_PREFIX", dynamo_namespace),
    ]
