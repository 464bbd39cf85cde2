"""How little our own programs may do in their containers.

They write to /tmp and nowhere else, need no capability and no root. An engine's caches lie all over
its file system, so vLLM's image keeps a writable root. An author's `securityContext` replaces ours
as a whole, because single fields of the two can contradict each other.
"""

from collections.abc import Mapping
from typing import Any

from dynamo_operator.render.merge import Json, mapping

SCRATCH_VOLUME = "dynamo-tmp"
SCRATCH = "/tmp"
"""Where a program may write, and its home."""
WRITES_ANYWHERE = ("vllm",)
"""Images whose programs write outside of /tmp."""


def security_context(image: str, pod: Mapping[str, Any], read_only_root: bool) -> Json:
    """Default `securityContext` of the main container in our image `image`.

    A pod whose author chose a user (in `pod`, its spec) may be meant to run as root.
    """
    context: Json = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    chosen = mapping(pod.get("securityContext"))
    if not {"runAsUser", "runAsNonRoot"} & chosen.keys():
        context["runAsNonRoot"] = True
    if has_scratch(image, read_only_root):
        context["readOnlyRootFilesystem"] = True
    return context


def has_scratch(image: str, read_only_root: bool) -> bool:
    """Whether the container gets a /tmp of its own to write to."""
    return read_only_root and image not in WRITES_ANYWHERE
