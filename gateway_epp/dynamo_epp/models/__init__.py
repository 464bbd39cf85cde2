"""What people say of models in Kubernetes: priorities (InferenceObjective), rewrites and canaries
(InferenceModelRewrite).

`rules` decides and is pure, `watch` follows the objects.
"""

from dynamo_epp.models.rules import NO_RULES, ModelRules, rules_from

__all__ = ["NO_RULES", "ModelRules", "rules_from"]
