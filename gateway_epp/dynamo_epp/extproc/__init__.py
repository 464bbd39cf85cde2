"""Envoy's external processing protocol as a state machine without I/O.

Every rule of the protocol can be tried by calling ``Exchange``; the gRPC shell around it
(``dynamo_epp.server``) only moves bytes.
"""

from dynamo_epp.extproc.exchange import Exchange
from dynamo_epp.extproc.messages import Picker, PickRequest, Refusal, RequestHead, Route

__all__ = ["Exchange", "PickRequest", "Picker", "Refusal", "RequestHead", "Route"]
