"""What all pickers can be told."""

from __future__ import annotations

from dynamo_crds.schema import Count

from dynamo_epp.scheduling.parameters import Parameters


class PickerParameters(Parameters):
    max_num_of_endpoints: Count = 0
    """Endpoints that are named, the pick and those behind it for retries; 0: as many as the picker
    names by itself."""
