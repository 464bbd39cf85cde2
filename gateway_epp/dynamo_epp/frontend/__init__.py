"""The frontend: one HTTP endpoint for many engines. Envoy moves bytes, the picker chooses."""

from dynamo_epp.frontend.bootstrap import bootstrap, write_eds
from dynamo_epp.frontend.settings import FrontendSettings
from dynamo_epp.frontend.supervisor import ServingPicker, run_frontend

__all__ = ["FrontendSettings", "ServingPicker", "bootstrap", "run_frontend", "write_eds"]
