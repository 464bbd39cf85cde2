"""Where a planner runs: what a pod's environment says, beside the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Each field says which variable it is from."""

    components: str = ""  # DYN_PLANNER_COMPONENTS
    graph: str = ""  # DYN_PARENT_DGD_K8S_NAME
    namespace: str = "default"  # DYN_PARENT_DGD_K8S_NAMESPACE, else POD_NAMESPACE
    discovery: str = "kubernetes"  # DYN_DISCOVERY_BACKEND
    endpoints_file: Path | None = None  # DYN_ENDPOINTS_FILE
    scale_socket: str = ""  # DYN_LOCAL_SCALE_SOCKET: `dynamo up` carries out, not Kubernetes
    host: str = "0.0.0.0"  # DYN_SYSTEM_HOST
    status_port: int = 9090  # DYN_SYSTEM_PORT
    metrics_port: int = 0  # PLANNER_PROMETHEUS_PORT; 0: only on the status port
    record: Path | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str], record: Path | None = None) -> Settings:
        """Raises ValueError with the variable and what would be right."""
        file = env.get("DYN_ENDPOINTS_FILE")
        return cls(
            components=env.get("DYN_PLANNER_COMPONENTS", ""),
            graph=env.get("DYN_PARENT_DGD_K8S_NAME", ""),
            namespace=env.get("DYN_PARENT_DGD_K8S_NAMESPACE")
            or env.get("POD_NAMESPACE")
            or "default",
            discovery=env.get("DYN_DISCOVERY_BACKEND") or "kubernetes",
            endpoints_file=Path(file) if file else None,
            scale_socket=env.get("DYN_LOCAL_SCALE_SOCKET", ""),
            host=env.get("DYN_SYSTEM_HOST") or "0.0.0.0",
            status_port=_port(env, "DYN_SYSTEM_PORT", 9090),
            metrics_port=_port(env, "PLANNER_PROMETHEUS_PORT", 0),
            record=record,
        )


def _port(env: Mapping[str, str], name: str, otherwise: int) -> int:
    text = env.get(name) or str(otherwise)
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError(f"{name} is {text!r}; it must be a port, 0 to 65535")
    return int(text)
