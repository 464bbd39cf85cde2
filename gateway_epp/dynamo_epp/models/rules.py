"""Which model serves a request for another, and how urgent a request is.

An InferenceModelRewrite sends requests for one model to others, split by weight (a canary); an
InferenceObjective gives a name to a priority, and a request says the name in a header.

Precedence, as the API defines it: a rule that names the model beats one for any model; then the
oldest object; then the first of its rules. Of targets with weights those without get nothing;
where none has a weight all are alike.

Fields: ``llm-d.ai/v1alpha2`` and ``inference.networking.x-k8s.io/v1alpha2``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo_kv_router.choice import Rng

log = logging.getLogger(__name__)

Json = Mapping[str, Any]

POOL_GROUP = "inference.networking.k8s.io"
"""The API's default of ``poolRef.group``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Where requests for a model go."""

    targets: tuple[tuple[str, int], ...]  # (model, weight), weights above 0; never empty
    source: str  # name of the object it comes from

    def draw(self, rng: Rng) -> str:
        """One of the targets, by weight."""
        point = rng.random() * sum(weight for _, weight in self.targets)
        for model, weight in self.targets:
            point -= weight
            if point < 0:
                return model
        return self.targets[-1][0]


@dataclass(frozen=True, slots=True)
class ModelRules:
    """All that is in force for one pool."""

    exact: Mapping[str, Rule] = field(default_factory=dict)  # by the model that a client names
    generic: Rule | None = None  # for every other model
    priorities: Mapping[str, int] = field(default_factory=dict)
    """By the name of an objective. Negative: the first to go when there is too much to do."""

    def rule(self, model: str) -> Rule | None:
        return self.exact.get(model, self.generic)

    @property
    def targets(self) -> frozenset[str]:
        """Every model that requests are sent to."""
        rules = (*self.exact.values(), *((self.generic,) if self.generic else ()))
        return frozenset(model for rule in rules for model, _ in rule.targets)


NO_RULES = ModelRules()


def rules_from(
    objectives: Iterable[Json], rewrites: Iterable[Json], pool: str, group: str = POOL_GROUP
) -> ModelRules:
    """The rules for the InferencePool named ``pool`` of that API group, of all objects in its
    namespace.

    An object of the same name in both API groups counts as the one that comes first in
    ``objectives``. What can't be understood is left out, with a line in the log.
    """
    priorities: dict[str, int] = {}
    for objective in objectives:
        if _refers_to(objective, pool, group):
            name = str(objective["metadata"]["name"])
            priorities.setdefault(name, int(objective["spec"].get("priority") or 0))
    exact: dict[str, Rule] = {}
    generic: Rule | None = None
    for rewrite in sorted(rewrites, key=_age):
        if not _refers_to(rewrite, pool, group):
            continue
        name = str(rewrite["metadata"]["name"])
        for number, each in enumerate(rewrite["spec"].get("rules") or ()):
            try:
                models, rule = _matches(each), Rule(_targets(each), name)
            except ValueError as error:
                log.error("InferenceModelRewrite %s: spec.rules[%d].%s", name, number, error)
                continue
            if not models and generic is None:
                generic = rule
            for model in models:
                exact.setdefault(model, rule)
    return ModelRules(exact, generic, priorities)


def _age(item: Json) -> tuple[str, str]:
    """The oldest first (RFC 3339 in UTC sorts as text), then by name."""
    metadata = item["metadata"]
    return metadata.get("creationTimestamp") or "", metadata["name"]


def _refers_to(item: Json, pool: str, group: str) -> bool:
    reference = (item.get("spec") or {}).get("poolRef") or {}
    return (
        reference.get("name") == pool
        and reference.get("kind", "InferencePool") == "InferencePool"
        and reference.get("group", POOL_GROUP) == group
    )


def _matches(rule: Json) -> tuple[str, ...]:
    """The models that the rule names; none: it is for all."""
    models = []
    for number, match in enumerate(rule.get("matches") or ()):
        model = match.get("model") or {}
        value, kind = model.get("value"), model.get("type", "Exact")
        if kind != "Exact":
            raise ValueError(f"matches[{number}].model.type is {kind!r}; only Exact is known")
        if not value:
            raise ValueError(f"matches[{number}].model.value is missing")
        models.append(str(value))
    return tuple(models)


def _targets(rule: Json) -> tuple[tuple[str, int], ...]:
    targets = rule.get("targets") or ()
    weighted = any(target.get("weight") is not None for target in targets)
    found = tuple(
        (str(target["modelRewrite"]), int(target.get("weight") or 0) if weighted else 1)
        for target in targets
        if target.get("modelRewrite")
    )
    found = tuple((model, weight) for model, weight in found if weight > 0)
    if not found:
        raise ValueError("targets names no model with a weight above 0")
    return found
