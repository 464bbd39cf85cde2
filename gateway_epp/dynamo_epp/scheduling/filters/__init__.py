"""Who may get a request: what every worker must be (`eligibility`), and the filters of profiles."""

from dynamo_epp.scheduling.filters.eligibility import RULES, reason_to_drop

__all__ = ["RULES", "reason_to_drop"]
