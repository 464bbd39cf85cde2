"""What an installation is made for."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_crds.generate import KINDS
from dynamo_runtime import __version__

from dynamo_operator.render.platform import OWN_REPOSITORY

CRD_NAMES = tuple(kind.crd for kind in KINDS)
OPERATOR = "dynamo-operator"
WEBHOOK = "dynamo-operator-webhook"
CERTIFICATE = "dynamo-operator-webhook-cert"
"""Secret of the webhook's certificate."""


@dataclass(frozen=True, slots=True)
class Installation:
    """One operator, with or without its webhook, in a namespace of its own."""

    namespace: str = "dynamo-system"
    """Where operator and webhook run."""
    image_prefix: str = OWN_REPOSITORY
    """Prefix of this platform's images, registry included, ending with a slash."""
    image_tag: str = __version__
    """Their tag."""
    map_images: tuple[str, ...] = ()
    """`PREFIX=OURS`: further images of graphs that ours replace."""
    replicas: int = 2
    """Of the operator: one leads, the others stand by with warm caches."""
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces that it is restricted to; empty: the whole cluster."""
    webhook: bool = True
    """Whether graphs are admitted by a webhook, and v1alpha1 is served."""
    cert_manager: bool = False
    """Whether cert-manager makes the webhook's certificate; else the webhook itself does."""
    pull_secrets: tuple[str, ...] = ()
    """Namespaces in which the operator may read Secrets, to find an image's pull secret."""

    @property
    def restricted(self) -> bool:
        return bool(self.watch_namespaces)

    @property
    def image(self) -> str:
        return f"{self.image_prefix}operator:{self.image_tag}"

    def cluster_name(self, name: str) -> str:
        """Name of an object outside of namespaces: restricted installations need their own."""
        return f"{name}-{self.namespace}" if self.restricted else name
