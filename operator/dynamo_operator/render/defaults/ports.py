"""Port numbers of one container, and how probes and Services refer to them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_operator.render.merge import Json


@dataclass(frozen=True, slots=True)
class Numbers:
    """Where the container's servers listen: its own variables, else the platform's ports."""

    http: int
    system: int
    stream: int


def port(name: str, number: int) -> Json:
    return {"containerPort": number, "name": name, "protocol": "TCP"}


@dataclass(frozen=True, slots=True)
class References:
    """Refers to a port by its name where the container has that name, else by number."""

    names: frozenset[str]

    @classmethod
    def of(cls, ports: Iterable[Mapping[str, Any]]) -> "References":
        return cls(frozenset(name for entry in ports if (name := entry.get("name"))))

    def __call__(self, name: str, number: int) -> str | int:
        return name if name in self.names else number


def http_probe(path: str, port: str | int, *, period: int, timeout: int, failures: int) -> Json:
    """An HTTP GET probe; times in seconds."""
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }
