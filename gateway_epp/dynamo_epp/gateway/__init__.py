"""`dynamo epp`: the picker behind a Gateway of somebody else's, reached over TCP and TLS."""

from dynamo_epp.gateway.process import run_picker
from dynamo_epp.gateway.settings import GatewaySettings, Tls

__all__ = ["GatewaySettings", "Tls", "run_picker"]
