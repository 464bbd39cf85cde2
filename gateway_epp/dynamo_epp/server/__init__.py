"""The gRPC shell around the ext_proc state machine: streams in, streams out, health, access log."""

from dynamo_epp.server.access_log import AccessEntry
from dynamo_epp.server.shell import PickerServer

__all__ = ["AccessEntry", "PickerServer"]
