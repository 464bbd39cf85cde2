"""Envoy's configuration for the frontend, as a pure function of the settings.

The shape: an ext_proc filter that sends headers and the buffered body to the picker and holds the
stream; a pool from an EDS file whose load balancer takes the picker's list of endpoints
(``override_host``) and nothing else; the access log streamed back to the picker. Paths are an
allowlist: an engine's admin routes can't be reached, because only four exact paths lead to engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_runtime.discovery import Endpoint

from dynamo_epp.extproc.messages import (
    DESTINATION_HEADER,
    PICKER_DETAILS,
    REQUEST_ID_HEADER,
    ROUTING_HEADER,
    ROUTING_HEADER_PREFIXES,
    ROUTING_HEADERS,
)
from dynamo_epp.frontend.settings import FrontendSettings
from dynamo_epp.requests.errors import error_body

Config = dict[str, Any]

ENGINE_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""POST to these goes to an engine that the picker chose."""
STATUS_PATHS = ("/v1/models", "/health", "/live", "/metrics")
"""GET of these, and of /v1/models/{id}, is answered by the picker's status server."""

ACCESS_LOG_FLUSH_S = 0.1
POOL = "pool"
_TYPE = "type.googleapis.com/envoy."
_UNLIMITED = 1_000_000  # of Envoy's circuit breakers, whose defaults (1024) queue requests silently


@dataclass(frozen=True, slots=True)
class Sockets:
    """Where the processes of one frontend meet: a private directory."""

    directory: Path

    @property
    def picker(self) -> Path:
        return self.directory / "epp.sock"

    @property
    def admin(self) -> Path:
        return self.directory / "admin.sock"

    @property
    def eds(self) -> Path:
        return self.directory / "eds.json"

    @property
    def bootstrap(self) -> Path:
        return self.directory / "envoy.json"


def bootstrap(settings: FrontendSettings, sockets: Sockets) -> Config:
    """The whole configuration, for ``envoy --config-path``."""
    return {
        "node": {"id": "dynamo-frontend", "cluster": "dynamo-frontend"},
        "admin": {"address": _pipe(sockets.admin)},
        "static_resources": {
            "listeners": [_listener(settings)],
            "clusters": [
                _picker_cluster(sockets),
                _status_cluster(settings),
                _pool_cluster(settings, sockets),
            ],
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{_TYPE}extensions.resource_monitors.downstream_connections.v3"
                        ".DownstreamConnectionsConfig",
                        "max_active_downstream_connections": _UNLIMITED,
                    },
                }
            ]
        },
    }


def write_eds(path: Path, endpoints: Iterable[Endpoint]) -> None:
    """Replace the pool's members in one step; Envoy sees the rename and takes the new list.

    Every endpoint with an address belongs in: which of them may get a request is the picker's
    business, and one that Envoy doesn't know yet could not be chosen.
    """
    members = sorted({(each.address, each.port) for each in endpoints if each.address})
    assignment = {
        "@type": f"{_TYPE}config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": POOL,
        "endpoints": [{"lb_endpoints": [_lb_endpoint(_tcp(*member)) for member in members]}],
    }
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps({"resources": [assignment]}))
    temporary.replace(path)


def _tcp(host: str, port: int) -> Config:
    return {"socket_address": {"address": host, "port_value": port}}


def _pipe(path: Path) -> Config:
    return {"pipe": {"path": str(path)}}


def _lb_endpoint(address: Config) -> Config:
    return {"endpoint": {"address": address}}


def _seconds(value: float) -> str:
    return f"{value:.3f}s"


def _listener(settings: FrontendSettings) -> Config:
    return {
        "name": "http",
        "address": _tcp(settings.http_host, settings.http_port),
        # Bounds the buffered body: over it Envoy answers 413.
        "per_connection_buffer_limit_bytes": settings.body_limit,
        # Two frontends on one port would each get a part of the requests, by surprise.
        "enable_reuse_port": False,
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": _connection_manager(settings),
                    }
                ]
            }
        ],
    }


def _connection_manager(settings: FrontendSettings) -> Config:
    return {
        "@type": f"{_TYPE}extensions.filters.network.http_connection_manager.v3"
        ".HttpConnectionManager",
        "stat_prefix": "frontend",
        "codec_type": "AUTO",
        "http_protocol_options": {"accept_http_10": True},  # nginx proxies with it by default
        "stream_idle_timeout": _seconds(settings.stream_idle_timeout),
        "request_timeout": "0s",
        "request_headers_timeout": "30s",  # a client that never finishes its headers
        # A connection that is about to close: how long its client may take no byte before it is
        # cut, and also how long the client of a lost worker waits for the end of its answer.
        "delayed_close_timeout": "5s",
        "use_remote_address": True,
        "server_header_transformation": "PASS_THROUGH",
        "normalize_path": True,
        "merge_slashes": True,
        # Model names hold slashes, and clients escape them. Unescaping comes before normalization,
        # and engines are behind exact paths only, so no escape leads to another path of theirs.
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD",
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "request_id_extension": {
            "typed_config": {
                "@type": f"{_TYPE}extensions.request_id.uuid.v3.UuidRequestIdConfig",
                "pack_trace_reason": False,
                "use_request_id_for_trace_sampling": False,
            }
        },
        "early_header_mutation_extensions": [_remove_steering_headers()],
        "access_log": [_access_log()],
        "local_reply_config": _local_replies(settings),
        "route_config": {
            "name": "routes",
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": _routes(settings)}],
            "request_headers_to_remove": ["x-envoy-external-address"],
        },
        "http_filters": [_ext_proc(settings), _router()],
    }


def _remove_steering_headers() -> Config:
    """Before anything looks at a request: what would choose a worker or steer Envoy is gone."""
    prefixes = (*ROUTING_HEADER_PREFIXES, "x-envoy-")
    removals: list[Config] = [
        {"remove_on_match": {"key_matcher": {"prefix": prefix, "ignore_case": True}}}
        for prefix in prefixes
    ]
    removals += [{"remove": name} for name in sorted(ROUTING_HEADERS)]
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": f"{_TYPE}extensions.http.early_header_mutation.header_mutation.v3"
            ".HeaderMutation",
            "mutations": removals,
        },
    }


def _access_log() -> Config:
    return {
        "name": "envoy.access_loggers.http_grpc",
        # Requests to engines; nobody needs an entry for each probe and scrape.
        "filter": {"header_filter": {"header": _method("POST")}},
        "typed_config": {
            "@type": f"{_TYPE}extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "common_config": {
                "log_name": "frontend",
                "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}},
                "transport_api_version": "V3",
                "buffer_flush_interval": _seconds(ACCESS_LOG_FLUSH_S),
            },
            "additional_request_headers_to_log": [REQUEST_ID_HEADER],
        },
    }


def _method(name: str) -> Config:
    return {"name": ":method", "string_match": {"exact": name}}


# Uptime checks ask with HEAD.
_READ: Config = {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD"}}}


# Local replies: what Envoy itself answers, in the words of OpenAI's API.


def _local_replies(settings: FrontendSettings) -> Config:
    """First match wins. Immediate responses of the picker and the routes' own errors are local
    replies too; they are worded already and match none of these."""
    size = f"the request's body is larger than {settings.body_limit} bytes"
    idle = f"nothing moved on this stream for {settings.stream_idle_timeout:g} s"
    return {
        "mappers": [
            _reply("413", size, "request_too_large"),
            _reply("503", "no engine could be reached", "no_engine_reached"),
            _reply("504", idle, "stream_idle_timeout"),
            _reply("408", idle, "stream_idle_timeout"),
            # Only a picker that can't be reached makes Envoy say 500.
            _reply(
                "500",
                "the endpoint picker could not be reached",
                "picker_unavailable",
                replace=503,
            ),
            _reply("", "%RESPONSE_CODE_DETAILS%", "bad_request"),
        ]
    }


def _reply(status: str, message: str, code: str, replace: int = 0) -> Config:
    expression = f"!(response.code_details in ['direct_response', '{PICKER_DETAILS}'])"
    if status:
        expression += f" && response.code == {status}"
    mapper: Config = {
        "filter": {
            "extension_filter": {
                "name": "envoy.access_loggers.extension_filters.cel",
                "typed_config": {
                    "@type": f"{_TYPE}extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                    "expression": expression,
                },
            }
        },
        "body_format_override": {
            "json_format": json.loads(
                error_body(replace or int(status or "400"), message, code=code)
            )
        },
    }
    if replace:
        mapper["status_code"] = replace
    return mapper


# Routes.


def _routes(settings: FrontendSettings) -> list[Config]:
    decision = []
    if settings.decision_header:
        value = f"%DYNAMIC_METADATA(envoy.lb:{ROUTING_HEADER})%"
        decision = [{"header": {"key": ROUTING_HEADER, "value": value}, "keep_empty_value": False}]
    routes: list[Config] = [
        {
            "name": "engine",
            "match": {"path": path, "headers": [_method("POST")]},
            "response_headers_to_add": decision,
            "route": {
                "cluster": POOL,
                "timeout": "0s",  # a long generation is no error; the idle timeout finds dead ones
                "retry_policy": {
                    "retry_on": "connect-failure,refused-stream,reset",
                    "num_retries": settings.retries,
                    "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.02s"},
                },
            },
        }
        for path in ENGINE_PATHS
    ]
    reads = [{"path": path} for path in STATUS_PATHS] + [{"prefix": "/v1/models/"}]
    routes += [
        {
            "name": "status",
            "match": {**match, "headers": [_READ]},
            "route": {"cluster": "status", "timeout": "15s"},
            "typed_per_filter_config": _WITHOUT_PICKER,
        }
        for match in reads
    ]
    routes += [
        _error(match, 405, f"use {method.replace(',', ' or')} here", allow=method)
        for matches, method in (
            ([{"path": path} for path in ENGINE_PATHS], "POST"),
            (reads, "GET, HEAD"),
        )
        for match in matches
    ]
    routes.append(_error({"prefix": "/"}, 404, "there is nothing at this path"))
    return routes


_WITHOUT_PICKER: Config = {
    "envoy.filters.http.ext_proc": {
        "@type": f"{_TYPE}extensions.filters.http.ext_proc.v3.ExtProcPerRoute",
        "disabled": True,
    }
}


def _error(match: Config, status: int, message: str, allow: str = "") -> Config:
    headers = {"content-type": "application/json"} | ({"allow": allow} if allow else {})
    code = {404: "not_found", 405: "method_not_allowed"}[status]
    return {
        "name": code,
        "match": match,
        "direct_response": {
            "status": status,
            "body": {"inline_string": error_body(status, message, code=code).decode()},
        },
        "response_headers_to_add": [
            {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
            for key, value in headers.items()
        ],
        "typed_per_filter_config": _WITHOUT_PICKER,
    }


# Filters.


def _ext_proc(settings: FrontendSettings) -> Config:
    return {
        "name": "envoy.filters.http.ext_proc",
        "typed_config": {
            "@type": f"{_TYPE}extensions.filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}},
            # Headers must be sent: without them the route is chosen before the picker answers.
            "processing_mode": {
                "request_header_mode": "SEND",
                "request_body_mode": "BUFFERED",
                "request_trailer_mode": "SKIP",
                "response_header_mode": "SKIP",
                "response_body_mode": "NONE",
                "response_trailer_mode": "SKIP",
            },
            "message_timeout": _seconds(settings.pick_timeout),
            "metadata_options": {"receiving_namespaces": {"untyped": ["envoy.lb"]}},
        },
    }


def _router() -> Config:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {
            "@type": f"{_TYPE}extensions.filters.http.router.v3.Router",
            "suppress_envoy_headers": True,
        },
    }


# Clusters.


def _http(options: Config, **more: Any) -> Config:
    return {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{_TYPE}extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": options,
            **more,
        }
    }


def _limits() -> Config:
    names = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [dict.fromkeys(names, _UNLIMITED)]}


def _static(name: str, address: Config) -> Config:
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": _limits(),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [_lb_endpoint(address)]}],
        },
    }


def _picker_cluster(sockets: Sockets) -> Config:
    return {
        **_static("picker", _pipe(sockets.picker)),
        "typed_extension_protocol_options": _http({"http2_protocol_options": {}}),
    }


def _status_cluster(settings: FrontendSettings) -> Config:
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = anywhere.get(settings.status_host, settings.status_host)
    return _static("status", _tcp(host, settings.status_port))


def _pool_cluster(settings: FrontendSettings, sockets: Sockets) -> Config:
    return {
        "name": POOL,
        "type": "EDS",
        "eds_cluster_config": {
            "service_name": POOL,
            "eds_config": {
                "resource_api_version": "V3",
                "path_config_source": {
                    "path": str(sockets.eds),
                    "watched_directory": {"path": str(sockets.directory)},
                },
            },
        },
        "connect_timeout": _seconds(settings.connect_timeout),
        "circuit_breakers": _limits(),
        "typed_extension_protocol_options": _http(
            {"http_protocol_options": {}},
            common_http_protocol_options={"idle_timeout": _seconds(settings.upstream_idle_timeout)},
        ),
        "upstream_connection_options": {
            "tcp_keepalive": {
                "keepalive_probes": 3,
                "keepalive_time": 30,
                "keepalive_interval": 10,
            }
        },
        "load_balancing_policy": {"policies": [_override_host()]},
    }


def _policy(name: str, **config: Any) -> Config:
    message = "".join(part.capitalize() for part in name.split("_"))
    return {
        "typed_extension_config": {
            "name": f"envoy.load_balancing_policies.{name}",
            "typed_config": {
                "@type": f"{_TYPE}extensions.load_balancing_policies.{name}.v3.{message}",
                **config,
            },
        }
    }


def _override_host() -> Config:
    """The picker's list, in its order, and no endpoint beside it.

    The fallback is a subset that holds nothing: a retry past the end of the list must not reach an
    endpoint of another role or another model.
    """
    nothing = _policy(
        "subset",
        fallback_policy="NO_FALLBACK",
        subset_selectors=[{"keys": ["none"], "fallback_policy": "NO_FALLBACK"}],
        subset_lb_policy={"policies": [_policy("round_robin")]},
    )
    return _policy(
        "override_host",
        override_host_sources=[{"header": DESTINATION_HEADER}],
        fallback_policy={"policies": [nothing]},
    )


def dump(config: Config) -> str:
    """The bytes that go into the file; stable, so that golden files can be compared."""
    return json.dumps(config, indent=1, ensure_ascii=False) + "\n"
