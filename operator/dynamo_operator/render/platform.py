"""What rendering must know about the platform beside the graph: plain data, given by the caller.

The operator fills it from its configuration, the local runner and `dynamo render` from
defaults, tests by hand. Nothing in `render` reads an environment variable, a file or a clock.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from dynamo_runtime import __version__

IMAGE_NAMES = ("frontend", "epp", "worker", "vllm", "planner")
"""Names of this platform's images: `<prefix><name>:<tag>`."""

OWN_REPOSITORY = "dynamo-platform/"
"""The repository that all of this platform's images share, whatever registry holds them."""

NVIDIA_PREFIX = "nvcr.io/nvidia/ai-dynamo/"


@dataclass(frozen=True, slots=True)
class Platform:
    """The platform a graph is rendered for."""

    namespace: str = "default"
    """Namespace of a graph whose metadata names none."""

    images: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType({NVIDIA_PREFIX: OWN_REPOSITORY}), hash=False
    )
    """Image prefix of another distribution → prefix of our images that take its place.
    The longest matching prefix wins; add a mirror of NVIDIA's registry as one more entry."""

    own_prefix: str = OWN_REPOSITORY
    """Prefix of the images used where a graph names none (registry included)."""

    image_tag: str = __version__
    """Tag of our images where they take the place of others."""

    image_pull_secrets: tuple[str, ...] = ()
    """Names of Secrets put on pods whose author gave none."""

    pull_secrets_by_registry: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )
    """Registry host → names of the docker Secrets for it in the graph's namespace; pods get those
    of their images' registries. Empty where nobody allowed the operator to read Secrets."""

    apis: frozenset[str] | None = None
    """Kinds beyond Kubernetes' own that the API server serves, as `group/Kind`:
    `leaderworkerset.x-k8s.io/LeaderWorkerSet`. None: all of them. What is wanted and not served
    gives a note."""

    drain_seconds: int = 900
    """Longest time running requests get to finish after SIGTERM, in seconds."""

    shared_memory_size: str = "8Gi"
    """Size limit of /dev/shm in workers that give none (a Kubernetes quantity; "0" for none)."""

    read_only_root: bool = True
    """Whether our programs' containers get a read-only root file system and a /tmp of their own;
    off where pods are processes of one machine."""

    def serves(self, group_kind: str) -> bool:
        """Whether objects of `group/Kind` can be applied."""
        return self.apis is None or group_kind in self.apis

    def image(self, name: str, prefix: str | None = None) -> str:
        """Full reference of our image `name`, below `prefix` (default: `own_prefix`)."""
        return f"{self.own_prefix if prefix is None else prefix}{name}:{self.image_tag}"

    def replacement_prefix(self, image: str) -> str | None:
        """The prefix of our images that replaces `image`'s, or None if it is not mapped."""
        best = ""
        for prefix in self.images:
            if len(prefix) > len(best) and image.startswith(prefix):
                best = prefix
        return self.images[best] if best else None


def image_map(mappings: Iterable[str], own_prefix: str) -> dict[str, str]:
    """`Platform.images` from `PREFIX=OURS` texts, beside NVIDIA's registry, which `own_prefix`
    replaces. Raises `ValueError` with what is wrong and what would be right."""
    if not own_prefix.endswith("/"):
        raise ValueError(f"image prefix {own_prefix!r} must end with a slash: {own_prefix}/")
    images = {NVIDIA_PREFIX: own_prefix}
    for mapping in mappings:
        prefix, equals, ours = mapping.partition("=")
        if not prefix or not equals or not ours:
            raise ValueError(f"image mapping {mapping!r}: expected PREFIX=OURS")
        images[prefix] = ours
    return images
