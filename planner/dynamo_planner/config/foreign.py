"""Dynamo's keys without a counterpart here: which change nothing, and which are refused.

A key whose loss a user can only notice in what is measured or shown is accepted, and said. One that
would scale otherwise than its author meant is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

RENAMED: Mapping[str, str] = {
    "ttft": "ttft_ms",
    "itl": "itl_ms",
    "throughput_adjustment_interval": "throughput_adjustment_interval_seconds",
    "load_adjustment_interval": "load_adjustment_interval_seconds",
    "no_operation": "advisory",
}
"""Names that Dynamo takes, or took, for the same key."""

_REPORT = "no report is written; decisions are at /planner/decisions"
WITHOUT_COUNTERPART: Mapping[str, str] = {
    "namespace": "components are found by the graph's own labels",
    "model_name": "a planner scales one graph, whatever it serves",
    "log_dir": "the log goes to standard error",
    "pre_deployment_sweeping_mode": "nothing is measured at the start; a profile is a file",
    "aic_interpolation": "there is no AIConfigurator; a profile is a file",
    "aic_perf_model": "there is no AIConfigurator; a profile is a file",
    "max_num_fpm_samples": "the live model keeps an hour",
    "fpm_sample_bucket_size": "the live model keeps an hour",
    "speculative_nextn": "tokens are counted as they come out",
    "throughput_metrics_source": "traffic is counted at the workers",
    "metric_reporting_prometheus_port": "set PLANNER_PROMETHEUS_PORT; /metrics is on the status "
    "server, too",
    "prophet_window_size": "holt-winters stands in for prophet and looks at all it has",
    "report_interval_hours": _REPORT,
    "report_output_dir": _REPORT,
    "report_filename": _REPORT,
    "report_write_gzip_log": "`--record FILE` writes what was seen and decided",
    "live_dashboard_port": _REPORT,
    "control_api_port": "limits change with the configuration only",
    "plugin_registration": "no plugins are called",
}
"""Accepted keys that change nothing -> what is so instead."""

REFUSED: Mapping[str, str] = {
    "global_planner_namespace": "there is no global planner: each graph's planner keeps its own "
    "max_gpu_budget",
    "total_gpu_power_limit": "power is not watched; max_gpu_budget is the limit that there is",
}
"""Keys that would be missed -> why they can't be had."""

_METRICS = "only the metrics of vLLM and of the simulated engine are read"
REFUSED_VALUES: Mapping[str, Mapping[object, str]] = {
    "environment": {"global-planner": REFUSED["global_planner_namespace"]},
    "backend": {
        "sglang": _METRICS,
        "trtllm": _METRICS,
    },
    "enable_power_awareness": {True: REFUSED["total_gpu_power_limit"]},
    "min_endpoint": {
        0: "a role can't be scaled to zero: nobody would scale it up for the first request"
    },
}
"""Values of known keys that can't be had -> why."""
