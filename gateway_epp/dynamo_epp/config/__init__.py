"""`EndpointPickerConfig` files: what people have for llm-d's picker configures this one."""

from dynamo_epp.config.kv_events import KvEvents
from dynamo_epp.config.loader import PickerConfig, given_config, load_config, load_document
from dynamo_epp.config.model import API_VERSIONS, KIND

__all__ = [
    "API_VERSIONS",
    "KIND",
    "KvEvents",
    "PickerConfig",
    "given_config",
    "load_config",
    "load_document",
]
