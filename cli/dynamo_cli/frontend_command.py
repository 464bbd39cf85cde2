"""`dynamo frontend`: Envoy and the picker as one OpenAI-compatible endpoint.

Flags are Dynamo's where they mean the same, so that a graph's `python3 -m dynamo.frontend ARGS`
can be run with its arguments unchanged. Those that have no counterpart are named in the log.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from dynamo_cli import admission_options as options
from dynamo_cli import pairing_options as paired

log = logging.getLogger(__name__)

WITHOUT_COUNTERPART = frozenset(
    """
    --active-decode-blocks-threshold --active-prefill-tokens-threshold
    --active-prefill-tokens-threshold-frac --admission-control --dump-config-to
    --dyn-chat-processor --dyn-default-thinking-mode --dyn-preprocess-workers
    --dyn-reasoning-parser --dyn-structural-tag --dyn-tool-call-parser --enable-anthropic-api
    --enable-session-prefix-index --enable-streaming-reasoning-dispatch
    --enable-streaming-tool-dispatch --event-plane
    --exclude-tools-when-tool-choice-none --grpc-metrics-port --kserve-grpc-server
    --kv-cache-block-size --load-aware --metrics-prefix --migration-limit
    --migration-max-seq-len --model-name --model-path --namespace --namespace-prefix
    --no-router-kv-events --reasoning-field-name --reasoning-parser --request-plane
    --response-plane --router-approximate-cache-policy --router-assume-kv-reuse
    --router-decode-policy --router-disk-cache-hit-weight
    --router-event-threads --router-host-cache-hit-weight --router-kv-events
    --router-min-initial-workers --router-policy-config --router-predicted-ttl-secs
    --router-prefill-load-model --router-prefill-policy --router-queue-policy
    --router-queue-threshold --router-replica-sync --router-session-affinity-ttl-secs
    --router-track-active-blocks --router-track-output-blocks --router-track-prefill-tokens
    --router-tracking-hash --router-ttl-secs --routing-group --serve-indexer
    --shared-cache-multiplier --shared-cache-type --strip-anthropic-preamble
    --tokenizer --tool-call-parser --trust-remote-code --use-remote-indexer
    """.split()  # noqa: SIM905 - as a literal it would be seventy lines
)
"""Flags of Dynamo's frontend that change nothing here: what they set is decided elsewhere (block
size and tokenizer by the workers, parsers by the engines) or does not exist."""


def unknown_arguments(
    arguments: list[str],
    known: list[str],
    without_counterpart: Collection[str] = WITHOUT_COUNTERPART,
) -> tuple[list[str], str]:
    """Split what no option took into flags without a counterpart here and an error message
    (empty if there is nothing else)."""
    ignored: list[str] = []
    takes_value = False
    for argument in arguments:
        if not argument.startswith("-"):
            if takes_value:
                takes_value = False
                continue
            return ignored, f"unexpected argument {argument!r}"
        name, equals, _ = argument.partition("=")
        if name not in without_counterpart:
            near = difflib.get_close_matches(name, [*known, *without_counterpart], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return ignored, f"no such option: {name}{hint}"
        ignored.append(name)
        takes_value = not equals
    return ignored, ""


CLUSTER_ACCEPT_SECONDS = 5.0
"""A pod is told to stop at the moment its removal from Services begins; every node's proxy (and a
load balancer outside) learns of it a little later, and sends new connections until then."""


def accept_seconds(given: float | None, discovery_backend: str) -> float:
    """How long a frontend that was told to stop still takes new requests."""
    if given is not None:
        return given
    return CLUSTER_ACCEPT_SECONDS if discovery_backend == "kubernetes" else 0.0


def frontend(
    context: typer.Context,
    http_host: Annotated[
        str, typer.Option(envvar="DYN_HTTP_HOST", help="Bind address of the API.")
    ] = "0.0.0.0",
    http_port: Annotated[
        int, typer.Option(envvar="DYN_HTTP_PORT", min=1, max=65535, help="Port of the API.")
    ] = 8000,
    system_host: Annotated[
        str, typer.Option(envvar="DYN_SYSTEM_HOST", help="Bind address of the status server.")
    ] = "0.0.0.0",
    system_port: Annotated[
        int,
        typer.Option(envvar="DYN_SYSTEM_PORT", min=1, max=65535, help="Port of the status server."),
    ] = 9090,
    endpoints_file: Annotated[
        Path | None,
        typer.Option(
            envvar="DYN_ENDPOINTS_FILE",
            help='JSON file with the engines: {"endpoints": [{"name", "address", "port", '
            '"ready", …}]}; replaced atomically when they change.',
        ),
    ] = None,
    discovery_backend: Annotated[
        str,
        typer.Option(
            envvar="DYN_DISCOVERY_BACKEND",
            help="Where the engines are listed: file, or kubernetes (the worker pods of a graph).",
        ),
    ] = "file",
    graph: Annotated[
        str,
        typer.Option(
            envvar="DYN_PARENT_DGD_K8S_NAME",
            help="kubernetes: name of the DynamoGraphDeployment.",
        ),
    ] = "",
    graph_namespace: Annotated[
        str,
        typer.Option(
            envvar=["DYN_PARENT_DGD_K8S_NAMESPACE", "POD_NAMESPACE"],
            help="kubernetes: its namespace; by default that of this pod, or of the kubeconfig.",
        ),
    ] = "",
    router_mode: Annotated[
        str,
        typer.Option(
            envvar="DYN_ROUTER_MODE",
            help="How a worker is chosen: kv (by cached prefix and load), round-robin, random, "
            "least-loaded, power-of-two.",
        ),
    ] = "kv",
    overlap_credit: Annotated[
        float,
        typer.Option(
            "--router-kv-overlap-score-credit",
            envvar="DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT",
            help="kv: blocks of prefill that one cached block saves.",
        ),
    ] = 1.0,
    overlap_credit_decay: Annotated[
        float,
        typer.Option(
            "--router-kv-overlap-score-credit-decay",
            envvar="DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY",
            help="kv: less credit for workers with more prefill queued.",
        ),
    ] = 0.0,
    prefill_load_scale: Annotated[
        float,
        typer.Option(
            "--router-prefill-load-scale",
            envvar="DYN_ROUTER_PREFILL_LOAD_SCALE",
            help="kv: weight of prefill work against decode blocks.",
        ),
    ] = 1.0,
    active_request_weight: Annotated[
        float,
        typer.Option(
            "--router-decode-active-request-weight",
            envvar="DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
            help="kv: cost in blocks of each running request.",
        ),
    ] = 0.0,
    temperature: Annotated[
        float,
        typer.Option(
            "--router-temperature",
            envvar="DYN_ROUTER_TEMPERATURE",
            help="kv: 0 takes the cheapest worker, more spreads the load.",
        ),
    ] = 0.0,
    unconfirmed_spread: Annotated[
        float,
        typer.Option(
            "--router-unconfirmed-spread",
            envvar="DYN_ROUTER_UNCONFIRMED_SPREAD",
            help="kv, stock engines: workers that cost at most this share of the prompt more count "
            "as good, too, so that several pickers don't all take the same one; 0: the cheapest.",
        ),
    ] = 0.5,
    config_file: Annotated[
        Path | None,
        typer.Option(
            envvar="DYN_PICKER_CONFIG",
            help="EndpointPickerConfig: how to schedule, instead of --router-….",
        ),
    ] = None,
    config_text: Annotated[str, typer.Option(help="The same as text, instead of a file.")] = "",
    enforce_disagg: paired.EnforceDisagg = False,
    conditional_disagg: paired.ConditionalDisagg = False,
    conditional_disagg_config: paired.ConditionalDisaggConfig = "",
    body_limit: Annotated[
        float,
        typer.Option(
            envvar="DYN_BODY_LIMIT_MIB", help="MiB; larger request bodies are answered with 413."
        ),
    ] = 32.0,
    stream_idle_timeout: Annotated[
        float,
        typer.Option(
            envvar="DYN_STREAM_IDLE_TIMEOUT_SECONDS",
            help="A stream on which nothing moves for so many seconds ends with an error. "
            "Longer than the longest prefill.",
        ),
    ] = 600.0,
    decision_header: Annotated[
        bool,
        typer.Option(
            envvar="DYN_DECISION_HEADER",
            help="Put x-dynamo-routing on responses. For trusted clients: it tells what is cached.",
        ),
    ] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(
            envvar="DYN_ENVOY_CONCURRENCY", min=1, help="Threads of Envoy; the cores, at most 2."
        ),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(
            envvar="DYN_DRAIN_SECONDS", min=0, help="Running requests get this long on SIGTERM."
        ),
    ] = 30.0,
    drain_accept_seconds: Annotated[
        float | None,
        typer.Option(
            envvar="DYN_DRAIN_ACCEPT_SECONDS",
            min=0,
            help="On SIGTERM new requests are still taken so long, until load balancers know. "
            "5 in a cluster, else 0.",
        ),
    ] = None,
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
    hold_seconds: options.HoldSeconds = 60.0,
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
    log_level: Annotated[
        str, typer.Option(envvar="DYN_LOG_LEVEL", help="DEBUG, INFO, WARNING or ERROR.")
    ] = "INFO",
) -> None:
    """Serve the OpenAI API for the engines of a graph, or of an endpoints file.

    Envoy moves the bytes; each request goes to the engine that the router chooses. Paths:
    /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses, /v1/models, /health,
    /live, /metrics. SIGTERM drains, a second one forces.

    Examples:

      dynamo frontend --endpoints-file endpoints.json

      dynamo frontend --endpoints-file endpoints.json --http-port 8080 --router-mode round-robin

      DYN_ENDPOINTS_FILE=endpoints.json dynamo frontend --decision-header

      dynamo frontend --discovery-backend kubernetes --graph my-graph
    """
    from dynamo_epp.config import given_config
    from dynamo_epp.frontend import FrontendSettings, run_frontend
    from dynamo_epp.frontend.settings import default_concurrency
    from dynamo_epp.serving import Misconfigured, PickerSettings, ServingKvPicker, endpoint_source
    from dynamo_kv_router.choice import Policy
    from dynamo_runtime import lifecycle as process
    from dynamo_runtime import logs
    from prometheus_client import CollectorRegistry

    known = [name for option in context.command.params for name in option.opts]
    ignored, error = unknown_arguments(context.args, known)
    if error:
        raise typer.BadParameter(error)
    settings = FrontendSettings(
        http_host=http_host,
        http_port=http_port,
        status_host=system_host,
        status_port=system_port,
        body_limit=int(body_limit * 1024 * 1024),
        stream_idle_timeout=stream_idle_timeout,
        decision_header=decision_header,
        drain_seconds=drain_seconds,
        drain_accept_seconds=accept_seconds(drain_accept_seconds, discovery_backend),
        concurrency=concurrency or default_concurrency(),
    )
    try:
        logs.configure("frontend", log_level)
        policy = Policy(
            mode=router_mode,
            overlap_score_credit=overlap_credit,
            overlap_score_credit_decay=overlap_credit_decay,
            prefill_load_scale=prefill_load_scale,
            decode_active_request_weight=active_request_weight,
            temperature=temperature,
            unconfirmed_spread=unconfirmed_spread,
        )
        disagg, secret = paired.pairing(
            enforce=enforce_disagg,
            conditional=conditional_disagg,
            config=conditional_disagg_config,
        )
        picker = PickerSettings(
            policy=policy,
            config=given_config(config_file, config_text),
            disagg=disagg,
            secret=secret,
            discovery_backend=discovery_backend,
            endpoints_file=endpoints_file,
            graph=graph,
            graph_namespace=graph_namespace,
            access_log=access_log,
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
        options.check_waits(picker, settings.pick_timeout)
        endpoint_source(picker)
    except (Misconfigured, ValueError) as problem:
        sys.stderr.write(f"dynamo frontend: {problem}\n")
        raise typer.Exit(2) from problem
    if ignored:
        log.warning("these flags of Dynamo's frontend have no effect here: %s", " ".join(ignored))

    async def main(lifecycle: process.Lifecycle) -> int:
        def make_picker(registry: CollectorRegistry) -> ServingKvPicker:
            return ServingKvPicker(picker, lifecycle, registry)

        return await run_frontend(settings, lifecycle, make_picker)

    raise typer.Exit(process.run(main))
