"""`dynamo epp`: the endpoint picker behind any Gateway.

Its command line is that of the reference pickers (llm-d's and the extension's own), so that it can
take their place in a Deployment: same flags, same ports, Go's way to write them. What has no
counterpart here is accepted and named in the log; what would weaken a deployment if it were ignored
is refused.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dynamo_cli import admission_options as options
from dynamo_cli import pairing_options as paired
from dynamo_cli.frontend_command import unknown_arguments

log = logging.getLogger(__name__)

WITHOUT_COUNTERPART: dict[str, str] = {
    "--allow-experimental-plugins": "every plugin that is known may be used",
    "--cache-info-metric": "names of metrics are known for each engine",
    "--disable-endpoint-subset-filter": "a Gateway's subset hint is always obeyed",
    "--emit-endpoint-scores": "scores are at /debug/decisions and in `dynamo explain`",
    "--enable-grpc-stream-metrics": "dynamo_epp_ext_proc_streams is always there",
    "--enable-pprof": "there is no Go profile",
    "--grpc-max-send-msg-size": "answers are sent in chunks of 62 kB",
    "--ha-enable-leader-election": "every replica picks; each learns from the workers themselves",
    "--health-checking": "health is always served",
    "--kubeconfig": "set KUBECONFIG",
    "--kv-cache-usage-percentage-metric": "names of metrics are known for each engine",
    "--lora-info-metric": "names of metrics are known for each engine",
    "--metrics-endpoint-auth": "metrics need no token: restrict who reaches the port by a "
    "NetworkPolicy",
    "--metrics-staleness-threshold": "staleness is judged by how often engines are asked",
    "--model-server-metrics-https-insecure-skip-verify": "engines are asked over HTTP",
    "--model-server-metrics-path": "engines are asked at /metrics",
    "--model-server-metrics-port": "engines are asked at the port that they serve",
    "--model-server-metrics-scheme": "engines are asked over HTTP",
    "--refresh-metrics-interval": "engines are asked every 250 ms, our workers tell by themselves",
    "--refresh-prometheus-metrics-interval": "metrics are current when they are asked for",
    "--total-queued-requests-metric": "names of metrics are known for each engine",
    "--total-running-requests-metric": "names of metrics are known for each engine",
    "--tracing": "set OTEL_EXPORTER_OTLP_ENDPOINT",
    "--zap-devel": "lines for people on a terminal, JSON otherwise",
    "--zap-encoder": "lines for people on a terminal, JSON otherwise",
    "--zap-log-level": "set --log-level",
    "--zap-stacktrace-level": "an exception always has its traceback",
    "--zap-time-encoding": "times are RFC 3339, in UTC",
}
"""Flags of the reference pickers that change nothing here -> what is so instead."""

REFUSED: dict[str, str] = {
    "--metrics-cert-dir": "metrics are served in plain text; put a proxy before the port",
    "--metrics-client-ca-file": "metrics are served to whoever reaches the port",
}
"""Flags whose users rely on them -> why they can't be had."""

_GO_BOOLEANS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h))")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMG]i?)?B?")
_SIZES = {None: 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}
_SIZES |= {"Ki": 2**10, "ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def go_arguments(arguments: list[str], flags: list[str], switches: list[str]) -> list[str]:
    """``arguments`` as click takes them: one dash or two, underscores for dashes, and switches with
    a value (``--secure-serving=false``) are Go's.

    ``flags`` are the names of all options, ``switches`` of those that take no value.
    """
    written = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        plain = "--" + name.lstrip("-").replace("_", "-")
        if not name.startswith("-") or plain not in flags:
            written.append(argument)
        elif plain in switches and equals and value.lower() in _GO_BOOLEANS:
            on = _GO_BOOLEANS[value.lower()]
            written.append(plain if on else f"--no-{plain[2:]}")
        else:
            written.append(f"{plain}{equals}{value}")
    return written


def duration(text: str) -> float:
    """Seconds in a duration as Go writes it (``1m30s``), or a plain number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        parts = _DURATION.findall(text)
        written = "".join(number + unit for number, unit in parts)
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
        if not parts or written != text:
            seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise typer.BadParameter(f"{text!r} is no duration; write 30s or 1m30s")
    return seconds


def size(text: str) -> int:
    """Bytes in a quantity as Kubernetes writes it (``10Mi``), or with a B behind it."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size; write 10MiB or 10485760")
    return int(float(found[1]) * _SIZES[found[2]])


def ports(text: str) -> tuple[int, ...]:
    """``8000,8001``. Raises ``typer.BadParameter``."""
    from dynamo_runtime.discovery import InvalidPool, target_ports

    try:
        return target_ports([int(part) for part in text.split(",")], "--endpoint-target-ports")
    except (ValueError, InvalidPool) as error:
        raise typer.BadParameter(
            str(error)
            if isinstance(error, InvalidPool)
            else f"{text!r} is no list of ports; write 8000,8001"
        ) from error


class GoCommand(TyperCommand):
    """A command whose arguments are written the way of Go's flag package, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = [name for parameter in self.params for name in parameter.opts]
        switches = [
            name
            for parameter in self.params
            for name in parameter.opts
            if getattr(parameter, "is_flag", False)
        ]
        known = [*flags, *WITHOUT_COUNTERPART, *REFUSED]
        return super().parse_args(ctx, go_arguments(args, known, switches))


COMMAND_CLASS = GoCommand


def epp(
    context: typer.Context,
    pool_name: Annotated[
        str, typer.Option(envvar="POOL_NAME", help="The InferencePool to pick for.")
    ] = "",
    pool_namespace: Annotated[
        str,
        typer.Option(
            envvar=["NAMESPACE", "POD_NAMESPACE"],
            help="Its namespace; by default that of this pod, or of the kubeconfig.",
        ),
    ] = "",
    pool_group: Annotated[
        str, typer.Option(help="API group of the InferencePool.")
    ] = "inference.networking.k8s.io",
    endpoint_selector: Annotated[
        str,
        typer.Option(
            help="Pick for the pods with these labels instead: no InferencePool, no CRD. As "
            "kubectl takes it: 'app=vllm,env in (a,b)'."
        ),
    ] = "",
    endpoint_target_ports: Annotated[
        str,
        typer.Option(
            help="Ports of those pods, with commas; each is an endpoint.", metavar="PORTS"
        ),
    ] = "",
    endpoints_file: Annotated[
        Path | None,
        typer.Option(
            envvar="DYN_ENDPOINTS_FILE",
            help="Pick for the engines in this JSON file instead, without Kubernetes.",
        ),
    ] = None,
    graph: Annotated[
        str,
        typer.Option(
            envvar="DYN_PARENT_DGD_K8S_NAME",
            help="Pick for the workers of this DynamoGraphDeployment instead.",
        ),
    ] = "",
    rules_pool: Annotated[
        str,
        typer.Option(
            envvar="DYN_RULES_POOL",
            help="The InferencePool whose InferenceObjectives and InferenceModelRewrites hold, "
            "where endpoints are found without one; by default --pool-name.",
        ),
    ] = "",
    host: Annotated[str, typer.Option(help="Bind address of all ports.")] = "0.0.0.0",
    grpc_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port that the Gateway asks (ext_proc).")
    ] = 9002,
    grpc_health_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of gRPC health, in plain text; 0: none.")
    ] = 9003,
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar="DYN_SYSTEM_PORT",
            min=1,
            max=65535,
            help="Port of the status server: /metrics, /ready, /debug.",
        ),
    ] = 9090,
    secure_serving: Annotated[
        bool, typer.Option(help="TLS on the picker's port; self-signed unless --cert-path.")
    ] = True,
    cert_path: Annotated[
        Path | None, typer.Option(help="Folder with tls.crt and tls.key for that port.")
    ] = None,
    enable_cert_reload: Annotated[
        bool, typer.Option(help="Use certificates that replace those in --cert-path.")
    ] = False,
    tls_min_version: Annotated[
        str, typer.Option(help="VersionTLS12 or VersionTLS13; nothing older is ever spoken.")
    ] = "",
    tls_cipher_suites: Annotated[
        str,
        typer.Option(
            help="Suites of TLS 1.2, separated by commas, as Go names them; those of TLS 1.3 are "
            "always on."
        ),
    ] = "",
    config_file: Annotated[
        Path | None,
        typer.Option(envvar="DYN_EPP_CONFIG_FILE", help="EndpointPickerConfig: how to schedule."),
    ] = None,
    config_text: Annotated[str, typer.Option(help="The same as text, instead of a file.")] = "",
    router_mode: Annotated[
        str,
        typer.Option(
            envvar="DYN_ROUTER_MODE",
            help="How an endpoint is chosen without a configuration: kv (by cached prefix and "
            "load), round-robin, random, least-loaded, power-of-two.",
        ),
    ] = "kv",
    fallback_endpoints: Annotated[
        int,
        typer.Option(
            min=0,
            help="Endpoints named behind the first, for Gateways that retry down the list. One "
            "with an ORIGINAL_DST cluster takes a single one.",
        ),
    ] = 0,
    any_path: Annotated[
        bool,
        typer.Option(
            help="Route requests on paths, or of models, that are not known here by load, instead "
            "of refusing them. What may be reached is up to the Gateway's routes then."
        ),
    ] = False,
    kv_events_bind: Annotated[
        str,
        typer.Option(
            envvar="DYN_KV_EVENTS_BIND",
            help="Stock engines that connect to this address send their KV events there: "
            "tcp://*:5557. Topics name the sender: kv@POD_IP@MODEL. By default zmqEndpoint of the "
            "configuration; engines that bind their own socket are asked in any case.",
        ),
    ] = "",
    kv_events_topic: Annotated[
        str,
        typer.Option(envvar="DYN_KV_EVENTS_TOPIC", help="How the topics of those events begin."),
    ] = "kv@",
    conformance_headers: Annotated[
        bool,
        typer.Option(
            help="Obey the headers of the extension's conformance suite, and --any-path. For test "
            "clusters: clients choose endpoints with them."
        ),
    ] = False,
    grpc_max_recv_msg_size: Annotated[
        str,
        typer.Option(
            envvar="DYN_BODY_LIMIT", help="A larger request body is answered with 413: 32MiB."
        ),
    ] = "32MiB",
    decision_header: Annotated[
        bool,
        typer.Option(
            envvar="DYN_DECISION_HEADER",
            help="Put x-dynamo-routing on responses. For trusted clients: it tells what is cached.",
        ),
    ] = False,
    drain_timeout: Annotated[
        str,
        typer.Option(
            envvar="DYN_DRAIN_SECONDS", help="Running requests get this long on SIGTERM: 30s."
        ),
    ] = "30s",
    drain_accept: Annotated[
        str,
        typer.Option(
            envvar="DYN_DRAIN_ACCEPT_SECONDS",
            help="For this part of it new requests are still taken, until the Gateway knows: 5s.",
        ),
    ] = "5s",
    access_log: Annotated[
        bool,
        typer.Option(
            envvar="DYN_ACCESS_LOG",
            help="Write a line for each request: how it was routed, what it cost, how it ended.",
        ),
    ] = False,
    flow_control: options.FlowControl = False,
    queue_seconds: options.QueueSeconds = 60.0,
    queue_requests: options.QueueRequests = 5000,
    queue_mib: options.QueueMiB = 1000.0,
    hold_seconds: options.HoldSeconds = 0.0,
    hold_models: options.HoldModels = "",
    full_queue_depth: options.FullQueueDepth = 5.0,
    full_kv_usage: options.FullKvUsage = 0.8,
    full_concurrency: options.FullConcurrency = 0.0,
    tenant_header: options.TenantHeader = "",
    tenant_from_api_key: options.TenantFromApiKey = False,
    priority_header: options.PriorityHeader = "",
    trust_flow_headers: options.TrustFlowHeaders = False,
    tenant_requests_per_second: options.TenantRequestsPerSecond = 0.0,
    tenant_tokens_per_second: options.TenantTokensPerSecond = 0.0,
    tenant_limits: options.TenantLimits = None,
    circuit_breaker: options.CircuitBreaker = True,
    circuit_failures: options.CircuitFailures = 5,
    enforce_disagg: paired.EnforceDisagg = False,
    conditional_disagg: paired.ConditionalDisagg = False,
    conditional_disagg_config: paired.ConditionalDisaggConfig = "",
    log_level: Annotated[
        str, typer.Option(envvar="DYN_LOG_LEVEL", help="DEBUG, INFO, WARNING or ERROR.")
    ] = "INFO",
    verbosity: Annotated[
        int,
        typer.Option(
            "--v", help="Verbosity as the reference pickers have it: 4 and more is DEBUG."
        ),
    ] = 0,
) -> None:
    """Pick endpoints for any Gateway that speaks the Endpoint Picker Protocol (ext_proc).

    Takes the command line of the reference pickers. SIGTERM drains, a second one forces.

    Examples:

      dynamo epp --pool-name my-pool

      dynamo epp --endpoint-selector app=vllm --endpoint-target-ports 8000

      dynamo epp --endpoints-file endpoints.json --secure-serving=false
    """
    from dynamo_epp.config import given_config
    from dynamo_epp.gateway import GatewaySettings, Tls, run_picker
    from dynamo_epp.serving import Misconfigured, PickerSettings, ServingKvPicker, endpoint_source
    from dynamo_kv_router.choice import Policy
    from dynamo_runtime import lifecycle as process
    from dynamo_runtime import logs
    from prometheus_client import CollectorRegistry

    known = [name for option in context.command.params for name in option.opts]
    passed, error = unknown_arguments(context.args, known, {*WITHOUT_COUNTERPART, *REFUSED})
    for name in passed:
        error = error or (f"{name} can't be had: {REFUSED[name]}" if name in REFUSED else "")
    if error:
        raise typer.BadParameter(error)
    if kv_events_bind and not kv_events_bind.startswith(("tcp://", "ipc://")):
        raise typer.BadParameter(
            f"--kv-events-bind {kv_events_bind} is no ZeroMQ address; write tcp://*:5557"
        )
    backend = _backend(pool_name, endpoint_selector, endpoints_file, graph)
    settings = GatewaySettings(
        host=host,
        grpc_port=grpc_port,
        health_port=grpc_health_port,
        status_port=metrics_port,
        tls=Tls(
            secure_serving,
            cert_path,
            enable_cert_reload,
            only_1_3=only_tls_1_3(tls_min_version),
            ciphers=cipher_suites(tls_cipher_suites),
        ),
        body_limit=size(grpc_max_recv_msg_size),
        drain_seconds=duration(drain_timeout),
        drain_accept_seconds=duration(drain_accept),
        decision_header=decision_header,
        conformance_headers=conformance_headers,
    )
    try:
        logs.configure("epp", "DEBUG" if verbosity >= 4 else log_level)
        disagg, secret = paired.pairing(
            enforce=enforce_disagg,
            conditional=conditional_disagg,
            config=conditional_disagg_config,
        )
        picker = PickerSettings(
            policy=Policy(mode=router_mode),
            config=given_config(config_file, config_text),
            discovery_backend=backend,
            endpoints_file=endpoints_file,
            graph=graph,
            graph_namespace=pool_namespace,
            pool_name=pool_name,
            pool_group=pool_group,
            rules_pool="" if backend == "file" else rules_pool,
            pool_namespace=pool_namespace,
            endpoint_selector=endpoint_selector,
            endpoint_target_ports=ports(endpoint_target_ports) if endpoint_target_ports else (),
            kv_events_bind=kv_events_bind,
            kv_events_topic=kv_events_topic,
            any_path=any_path or conformance_headers,
            fallbacks=fallback_endpoints,
            access_log=access_log,
            relays=True,
            disagg=disagg,
            secret=secret,
            flow_control=options.flow_control(
                enabled=flow_control,
                queue_seconds=queue_seconds,
                queue_requests=queue_requests,
                queue_mib=queue_mib,
                hold_seconds=hold_seconds,
                hold_models=hold_models,
                full_queue_depth=full_queue_depth,
                full_kv_usage=full_kv_usage,
                full_concurrency=full_concurrency,
                tenant_header=tenant_header,
                tenant_from_api_key=tenant_from_api_key,
                priority_header=priority_header,
                trust_flow_headers=trust_flow_headers,
                requests_per_second=tenant_requests_per_second,
                tokens_per_second=tenant_tokens_per_second,
                tenant_limits=tenant_limits,
            ),
            breaker=options.breaker(enabled=circuit_breaker, failures=circuit_failures),
        )
        endpoint_source(picker)
    except (Misconfigured, ValueError) as problem:
        sys.stderr.write(f"dynamo epp: {problem}\n")
        raise typer.Exit(2) from problem
    for name in passed:
        log.info("%s has no effect: %s", name, WITHOUT_COUNTERPART[name])
    if not picker.ruled_pool:
        log.info(
            "InferenceObjectives and InferenceModelRewrites are not followed: they name an "
            "InferencePool, and neither --pool-name nor --rules-pool does"
        )
    if conformance_headers:
        log.warning("--conformance-headers: clients can choose their endpoint")

    async def main(lifecycle: process.Lifecycle) -> int:
        def make_picker(registry: CollectorRegistry) -> ServingKvPicker:
            return ServingKvPicker(picker, lifecycle, registry)

        return await run_picker(settings, lifecycle, make_picker)

    raise typer.Exit(process.run(main))


def _backend(pool: str, selector: str, file: Path | None, graph: str) -> str:
    """Where the endpoints come from: the most explicit of what is given."""
    if pool and selector:
        raise typer.BadParameter("--pool-name and --endpoint-selector exclude each other")
    if pool:
        return "inference-pool"
    if selector:
        return "pods"
    if file is not None:
        return "file"
    if graph:
        return "kubernetes"
    raise typer.BadParameter(
        "no endpoints: give --pool-name, or --endpoint-selector with --endpoint-target-ports"
    )


def only_tls_1_3(version: str) -> bool:
    """What a name of Go's says of TLS 1.2. Raises ``typer.BadParameter``."""
    if version in ("", "VersionTLS10", "VersionTLS11", "VersionTLS12"):
        return False
    if version == "VersionTLS13":
        return True
    raise typer.BadParameter(
        f"--tls-min-version {version} is unknown; write VersionTLS12 or VersionTLS13"
    )


_SUITES = {
    f"TLS_{exchange}_WITH_{cipher}": f"{exchange.replace('_', '-')}-{openssl}"
    for exchange in ("ECDHE_ECDSA", "ECDHE_RSA")
    for cipher, openssl in {
        "AES_128_GCM_SHA256": "AES128-GCM-SHA256",
        "AES_256_GCM_SHA384": "AES256-GCM-SHA384",
        "CHACHA20_POLY1305_SHA256": "CHACHA20-POLY1305",
    }.items()
}
"""Those of TLS 1.2 that HTTP/2 allows (RFC 9113 appendix A): Go's name -> OpenSSL's."""


_TLS_1_3 = {
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
}
"""Always on."""


def cipher_suites(names: str) -> tuple[str, ...]:
    """OpenSSL's names of the suites. Raises ``typer.BadParameter``."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    found = []
    for name in asked:
        full = f"{name}_SHA256" if name.endswith("CHACHA20_POLY1305") else name
        if full in _TLS_1_3:
            continue
        if full not in _SUITES:
            raise typer.BadParameter(
                f"--tls-cipher-suites: {name} is none that HTTP/2 allows; "
                f"use of {', '.join(_SUITES)}"
            )
        found.append(_SUITES[full])
    return tuple(found)
