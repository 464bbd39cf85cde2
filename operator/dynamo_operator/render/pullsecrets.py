"""Which Secrets a pod needs to pull its images: those for the registries that they come from."""

from collections.abc import Iterable, Mapping
from typing import Any

from dynamo_operator.render.merge import Json, entries, mapping
from dynamo_operator.render.platform import Platform

DOCKER_HUB = "docker.io"
_DOCKER_HUBS = (DOCKER_HUB, "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")


def registry(image: str) -> str:
    """Host (and port) of the registry that an image comes from: Docker's if it names none."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return host(first)
    return DOCKER_HUB


def host(server: str) -> str:
    """The registry host that a key of a docker configuration stands for: without scheme and path,
    Docker's own under one name."""
    name = server.partition("://")[2] or server
    name = name.partition("/")[0].lower()
    return DOCKER_HUB if name in _DOCKER_HUBS else name


def of_pod(spec: Mapping[str, Any], platform: Platform, discover: bool) -> list[Json]:
    """`imagePullSecrets` of a pod: the platform's, and (`discover`) those of its registries."""
    found = dict.fromkeys(platform.image_pull_secrets)
    if discover and platform.pull_secrets_by_registry:
        index: dict[str, list[str]] = {}
        for server, secrets in sorted(platform.pull_secrets_by_registry.items()):
            index.setdefault(host(server), []).extend(secrets)
        for image in _images(spec):
            found |= dict.fromkeys(sorted(index.get(registry(image), ())))
    return [{"name": name} for name in found]


def _images(spec: Mapping[str, Any]) -> Iterable[str]:
    for key in ("containers", "initContainers"):
        for container in entries(spec.get(key)):
            image = mapping(container).get("image")
            if isinstance(image, str):
                yield image
