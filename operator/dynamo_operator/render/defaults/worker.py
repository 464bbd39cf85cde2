"""Workers, of whatever role: an engine, and beside it our launcher's status server and stream.

An engine may need an hour to load its model, so the time to start is two hours, and a busy
process is not killed for one slow answer. A worker is ready when requests may come: when its
launcher says so, or, for an engine without launcher, when the engine does.
"""

from dynamo_operator.render.defaults.ports import Numbers, References, http_probe, port
from dynamo_operator.render.environment import variable
from dynamo_operator.render.merge import Json
from dynamo_operator.render.runtimes import Family

STARTUP_SECONDS = 7200
COMPILATION_CACHE = "/root/.cache/vllm"
OWN_COMPILATION_CACHE = "/var/cache/vllm"
"""In our image, whose user may not look into /root."""


def ports(family: Family, numbers: Numbers) -> list[Json]:
    match family:
        case Family.LAUNCHER:
            return [
                port("http", numbers.http),
                port("system", numbers.system),
                port("worker-stream", numbers.stream),
            ]
        case Family.STOCK:
            return [port("http", numbers.http)]
        case _:
            return [port("system", numbers.system)]


def probes(family: Family, numbers: Numbers, refer: References) -> Json:
    system = refer("system", numbers.system)
    match family:
        case Family.LAUNCHER:
            return {
                # The launcher is up in a second or two: ask often, but as long as for any engine.
                "startupProbe": _startup("/live", system, period=2),
                "livenessProbe": http_probe("/live", system, period=10, timeout=5, failures=6),
                "readinessProbe": http_probe("/ready", system, period=2, timeout=3, failures=3),
            }
        case Family.STOCK:
            http = refer("http", numbers.http)
            return {
                "startupProbe": _startup("/health", http, period=10),
                "livenessProbe": http_probe("/health", http, period=10, timeout=10, failures=6),
                "readinessProbe": http_probe("/health", http, period=5, timeout=5, failures=3),
            }
        case _:
            return {
                "startupProbe": _startup("/live", system, period=10),
                "livenessProbe": http_probe("/live", system, period=5, timeout=4, failures=3),
                "readinessProbe": http_probe("/health", system, period=10, timeout=4, failures=3),
            }


def _startup(path: str, port: str | int, *, period: int) -> Json:
    return http_probe(path, port, period=period, timeout=5, failures=STARTUP_SECONDS // period)


def environment(family: Family, numbers: Numbers) -> list[Json]:
    match family:
        case Family.LAUNCHER:
            return [
                variable("DYN_HTTP_PORT", str(numbers.http)),
                variable("DYN_SYSTEM_PORT", str(numbers.system)),
                variable("DYN_STREAM_PORT", str(numbers.stream)),
            ]
        case Family.STOCK:
            return []
        case _:  # what Dynamo's own workers expect of their operator
            return [
                variable("DYN_SYSTEM_ENABLED", "true"),
                variable("DYN_SYSTEM_PORT", str(numbers.system)),
                variable("DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS", '["generate"]'),
                variable("DYN_HEALTH_CHECK_ENABLED", "false"),
            ]
