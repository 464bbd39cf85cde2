"""What rendering has to say beside the manifests.

A field that is accepted but not rendered, or a container that is changed, is never silent: each
gives a note with a reason that machines can match (it becomes the condition's reason) and a
message for people.
"""

from dataclasses import dataclass

RUNTIME_UNSUPPORTED = "RuntimeUnsupported"
RUNTIME_MAPPED = "RuntimeMapped"
ENGINE_BUILD = "EngineBuildNeeded"
FLAGS_TRANSLATED = "FlagsTranslated"
TYPE_INFERRED = "TypeInferred"
ROLE_CONFLICT = "RoleConflict"
IMAGE_DEFAULTED = "ImageDefaulted"
FRONTEND_SIDECAR_REPLACED = "FrontendSidecarReplaced"
LABEL_RESERVED = "LabelReserved"
PORT_TAKEN = "PortTaken"
CLAIM_ASSUMED = "ClaimAssumed"
DRAIN_EXCEEDS_GRACE = "DrainExceedsGrace"
SERVICE_RENAMED = "ServiceRenamed"
NOTHING_TO_SCALE = "PlannerHasNothingToScale"
DISCOVERY_BACKEND_IGNORED = "DiscoveryBackendIgnored"
MULTINODE_NEEDS_LWS = "MultinodeNeedsLeaderWorkerSet"
MULTINODE_NEEDS_SECRET = "MultinodeNeedsSecret"
MULTINODE_FITS_ONE_NODE = "MultinodeFitsOneNode"
POOL_NEEDS_API = "InferencePoolNotServed"
ROUTE_NEEDS_API = "HTTPRouteNotServed"
MONITOR_NEEDS_API = "PodMonitorNotServed"
GATEWAY_UNREADABLE = "GatewayUnreadable"
NOTHING_TO_ROUTE_TO = "GatewayHasNothingToRouteTo"
POOL_PORTS_DIFFER = "InferencePoolPortsDiffer"
CONNECTOR_UNSUPPORTED = "KvConnectorUnsupported"

_OMISSIONS = frozenset(
    {
        MULTINODE_NEEDS_LWS,
        POOL_NEEDS_API,
        ROUTE_NEEDS_API,
        MONITOR_NEEDS_API,
        GATEWAY_UNREADABLE,
        NOTHING_TO_ROUTE_TO,
    }
)
"""Reasons for which something is left out, beside those that end so."""
_OMITTED = "NotRendered"
_TO_DO = frozenset({ENGINE_BUILD, CONNECTOR_UNSUPPORTED, MULTINODE_NEEDS_SECRET})
"""Reasons for which nothing serves until somebody has done something."""


@dataclass(frozen=True, slots=True, order=True)
class Note:
    """One thing the author of a graph should know."""

    component: str
    """Name of the component it is about; "" for the graph as a whole."""
    reason: str
    """CamelCase, stable: `MultinodeNeedsLeaderWorkerSet`, `RuntimeUnsupported`, …"""
    message: str
    """One sentence: what was found and what became of it."""

    @property
    def is_omission(self) -> bool:
        """Whether something that the graph asks for is left out."""
        return self.reason.endswith(_OMITTED) or self.reason in _OMISSIONS

    def __str__(self) -> str:
        where = f"component {self.component}: " if self.component else ""
        return f"{where}{self.reason}: {self.message}"


class Notes:
    """Collects notes."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Note] = []

    def add(self, component: str, reason: str, message: str) -> None:
        self.items.append(Note(component, reason, message))

    def ordered(self) -> list[Note]:
        """In the order they arose, but first what somebody has to do: messages of conditions end
        somewhere."""
        return sorted(self.items, key=lambda note: note.reason not in _TO_DO)
