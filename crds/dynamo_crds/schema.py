"""What every model of a custom resource is built from.

One model has to serve three readers: Python code (typed attributes), a person whose manifest is
wrong (path, value, expectation) and the API server (structural schema and CEL). So a constraint is
written once, here as a type or beside its model as a `Rule`, and `check` and the generator both
read it from there.

Kubernetes prunes a `null` where an object, a list or a scalar belongs, so the models drop `null`
values before they validate; inside opaque objects it is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

Path = tuple[str | int, ...]

QUANTITY_PATTERN = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
QUANTITY_EXPECTED = "a quantity such as 1, 500m, 16Gi"
DNS_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
TOPOLOGY_DOMAIN_PATTERN = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"

_QUANTITY = re.compile(QUANTITY_PATTERN)
_SUFFIX = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


def is_quantity(value: object) -> bool:
    """Whether Kubernetes reads `value` as a resource quantity (an integer or its text form)."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return True
    return isinstance(value, str) and _QUANTITY.match(value) is not None


def quantity_number(value: int | str) -> float:
    """The number that a valid quantity stands for: `"16Gi"` is 17179869184.0, `"500m"` is 0.5."""
    if isinstance(value, int):
        return float(value)
    match = re.match(r"^([+-]?[0-9.]+)(.*)$", value)
    if match is None or not is_quantity(value):
        raise ValueError(f"{value!r} is not {QUANTITY_EXPECTED}")
    digits, suffix = match.groups()
    if suffix.endswith("i"):
        return float(digits) * math.pow(1024.0, _SUFFIX[suffix[0].replace("K", "k")])
    if suffix[:1] in ("e", "E") and len(suffix) > 1:
        return float(digits) * math.pow(10.0, float(suffix[1:]))
    return float(digits) * math.pow(1000.0, _SUFFIX[suffix])


def without_null(value: Any) -> Any:
    """`value` with every mapping entry that is `null` left out, at any depth."""
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_null(item) for item in value]
    return value


def drop_null_entries(value: Any) -> Any:
    """`value` without the entries that are `null`, if it is a mapping; not deeper."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value


def _quantity(value: Any) -> int | str:
    if not is_quantity(value):
        raise PydanticCustomError("quantity", "not a quantity", {"expected": QUANTITY_EXPECTED})
    return value  # type: ignore[no-any-return]


Int32 = Annotated[
    StrictInt, Field(ge=-(2**31), le=2**31 - 1, json_schema_extra={"format": "int32"})
]
Int64 = Annotated[StrictInt, Field(json_schema_extra={"format": "int64"})]
Bool = StrictBool
Number = StrictFloat
Count = Annotated[Int32, Field(ge=0)]
Positive = Annotated[Int32, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
DnsLabel = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL_PATTERN)]
TopologyDomain = Annotated[str, Field(pattern=TOPOLOGY_DOMAIN_PATTERN)]
QuantityText = Annotated[str, Field(pattern=QUANTITY_PATTERN)]
StringMap = Annotated[dict[str, str], BeforeValidator(drop_null_entries)]
Quantity = Annotated[
    int | str,
    PlainValidator(_quantity),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": QUANTITY_PATTERN,
            "x-kubernetes-int-or-string": True,
        }
    ),
]
QuantityMap = Annotated[dict[str, Quantity], BeforeValidator(drop_null_entries)]
Opaque = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]
"""An object that is somebody else's: any content, `null` included, is kept as it is."""


LENIENT: Mapping[str, Any] = MappingProxyType({"lenient": True})
"""Validation context in which only types are checked: see `Model.lenient`."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: `path` is relative to the object that the rule is about."""

    path: Path
    value: Any
    expected: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """A constraint over several fields, in Python for `check` and in CEL for the API server.

    `at` names the field (as in the manifest) whose value the rule is about; empty means the object
    itself. `check` gets that value as plain JSON data, possibly malformed, and must not raise.
    A rule about a change (`oldSelf`) can only be checked by the API server: its `check` is None.
    A rule without `cel` is one that CEL could say only at a cost the API server refuses.
    """

    message: str
    cel: str | None = None
    at: str = ""
    check: Callable[[Any], Iterable[Violation]] | None = None
    optional_old_self: bool = False

    def to_crd(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"message": self.message, "rule": self.cel}
        if self.optional_old_self:
            entry["optionalOldSelf"] = True
        return entry


class Model(BaseModel):
    """Base of all models: camelCase in manifests, snake_case in Python, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Names that people look for in this object, and what to write instead."""

    @model_validator(mode="before")
    @classmethod
    def _prune_null(cls, data: Any) -> Any:
        return drop_null_entries(data)

    @model_validator(mode="after")
    def _apply_rules(self, info: ValidationInfo) -> Self:
        if info.context is LENIENT:
            return self
        if not self.rules and not any(_list_keys(f) for f in type(self).model_fields.values()):
            return self
        violations = list(own_violations(type(self), self.manifest()))
        if violations:
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(
                        type=PydanticCustomError(
                            "rule", "{rule}", {"rule": v.message, "expected": v.expected}
                        ),
                        loc=v.path,
                        input=v.value,
                    )
                    for v in violations
                ],
            )
        return self

    @classmethod
    def lenient(cls, data: Any) -> Self:
        """`data` as this model, though it may break rules and have unknown fields (ignored).

        For objects that exist already: what was accepted once must stay readable. Raises pydantic's
        ValidationError for wrong types and missing fields.
        """
        return cls.model_validate(
            data, by_alias=True, by_name=False, extra="ignore", context=LENIENT
        )

    def manifest(self) -> dict[str, Any]:
        """The object as it stands in a manifest: only what was set, names in camelCase."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return cls.marked(handler.resolve_ref_schema(handler(schema)))

    @classmethod
    def marked(cls, schema: JsonSchemaValue) -> JsonSchemaValue:
        """The model's JSON schema (changed in place) with Kubernetes' marks; can be repeated."""
        for at in {rule.at for rule in cls.rules if rule.cel is not None}:
            target = schema["properties"][at] if at else schema
            target["x-kubernetes-validations"] = [
                rule.to_crd() for rule in cls.rules if rule.at == at and rule.cel is not None
            ]
        if schema.pop("additionalProperties", False) is True:
            schema["x-kubernetes-preserve-unknown-fields"] = True
        return schema


class Resource(Model):
    """A whole object: what has an `apiVersion` and a `kind`."""

    def manifest(self) -> dict[str, Any]:
        head = {name: getattr(self, name) for name in ("api_version", "kind")}
        return {"apiVersion": head["api_version"], "kind": head["kind"], **super().manifest()}


class OpenModel(Model):
    """A declared core of an object whose other fields are kept unread."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True, slots=True)
class RawObject:
    """Annotates a raw `dict` field: it stays as written, and its core must satisfy `model`."""

    model: type[Model]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def check_core(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
            if info.context is LENIENT:
                self.model.lenient(value)
            else:
                self.model.model_validate(value)
            return value

        return core_schema.with_info_after_validator_function(
            check_core, core_schema.no_info_before_validator_function(without_null, handler(source))
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        core = handler(self.model.__pydantic_core_schema__)
        return self.model.marked(handler.resolve_ref_schema(core))


def list_map(*keys: str) -> dict[str, Any]:
    """Schema marks of a list whose items are unique by `keys` (Kubernetes' list type `map`)."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


LIST_SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}


def _list_keys(field: FieldInfo) -> tuple[str, ...]:
    extra = field.json_schema_extra
    if not isinstance(extra, dict):
        return ()
    if extra.get("x-kubernetes-list-type") == "set":
        return ("",)
    keys = extra.get("x-kubernetes-list-map-keys", [])
    return tuple(str(key) for key in keys) if isinstance(keys, list) else ()


def manifest_name(name: str, field: FieldInfo) -> str:
    """A field's name in a manifest."""
    return field.alias or name


def _duplicates(items: Any, keys: tuple[str, ...]) -> Iterator[Violation]:
    if not isinstance(items, list):
        return
    seen: dict[tuple[Any, ...], int] = {}
    for index, item in enumerate(items):
        if keys == ("",):
            identity: tuple[Any, ...] = (repr(item),)
            where: Path = (index,)
            value = item
        elif isinstance(item, Mapping):
            identity = tuple(repr(item.get(key)) for key in keys)
            where = (index, keys[0])
            value = item.get(keys[0])
        else:
            continue
        first = seen.setdefault(identity, index)
        if first != index:
            yield Violation(where, value, f"a value not used by item [{first}]", "given twice")


def own_violations(model: type[Model], data: Any) -> Iterator[Violation]:
    """Broken rules of `model` about `data` itself, those of nested objects left out."""
    if not isinstance(data, Mapping):
        return
    for name, field in model.model_fields.items():
        alias = manifest_name(name, field)
        keys = _list_keys(field)
        if keys:
            for violation in _duplicates(data.get(alias), keys):
                yield _below((alias,), violation, violation.message)
    for rule in model.rules:
        if rule.check is None or (rule.at and data.get(rule.at) is None):
            continue
        for violation in rule.check(data[rule.at] if rule.at else data):
            prefix: Path = (rule.at,) if rule.at else ()
            yield _below(prefix, violation, violation.message or rule.message)


def _below(prefix: Path, violation: Violation, message: str) -> Violation:
    return Violation(prefix + violation.path, violation.value, violation.expected, message)


@dataclass(frozen=True, slots=True)
class Child:
    """What a field holds: models directly, in a list, or as the values of a map."""

    model: type[Model]
    container: type | None  # None, list or dict


def child_of(field: FieldInfo) -> Child | None:
    """The model behind a field's annotation, or None for scalars and opaque objects."""
    for mark in field.metadata:
        if isinstance(mark, RawObject):
            return Child(mark.model, None)
    return _child_of_annotation(field.annotation)


def _child_of_annotation(annotation: Any, container: type | None = None) -> Child | None:
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return Child(annotation, container)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for mark in arguments[1:]:
            if isinstance(mark, RawObject):
                return Child(mark.model, container)
        return _child_of_annotation(arguments[0], container)
    if origin is list:
        return _child_of_annotation(arguments[0], list)
    if origin is dict:
        return _child_of_annotation(arguments[1], dict)
    for argument in arguments:
        child = _child_of_annotation(argument, container)
        if child is not None:
            return child
    return None


def violations(model: type[Model], data: Any, path: Path = ()) -> Iterator[Violation]:
    """Every broken rule in `data` (plain JSON data, `null` pruned), nested objects included.

    Needs no valid object: rules of one part are checked however broken the others are.
    """
    if not isinstance(data, Mapping):
        return
    for violation in own_violations(model, data):
        yield _below(path, violation, violation.message)
    for name, field in model.model_fields.items():
        alias = manifest_name(name, field)
        child = child_of(field)
        value = data.get(alias)
        if child is None or value is None:
            continue
        below = (*path, alias)
        if child.container is list and isinstance(value, list):
            for index, item in enumerate(value):
                yield from violations(child.model, item, (*below, index))
        elif child.container is dict and isinstance(value, Mapping):
            for key, item in value.items():
                yield from violations(child.model, item, (*below, str(key)))
        elif child.container is None:
            yield from violations(child.model, value, below)


def pruned(model: type[Model], data: Any) -> Any:
    """`data` without the `null`s that the API server prunes; what is unknown or opaque stays."""
    if not isinstance(data, dict):
        return data
    fields = {manifest_name(name, field): field for name, field in model.model_fields.items()}
    result: dict[str, Any] = {}
    for key, value in data.items():
        if value is None:
            continue
        field = fields.get(key)
        child = None if field is None else child_of(field)
        if field is not None and any(isinstance(mark, RawObject) for mark in field.metadata):
            result[key] = without_null(value)
        elif child is None:
            result[key] = value
        elif child.container is list and isinstance(value, list):
            result[key] = [pruned(child.model, item) for item in value]
        elif child.container is dict and isinstance(value, dict):
            items = drop_null_entries(value).items()
            result[key] = {name: pruned(child.model, item) for name, item in items}
        else:
            result[key] = pruned(child.model, value)
    return result


def model_at(model: type[Model], path: Path) -> type[Model] | None:
    """The model of the object at `path`, or None where a path leads into opaque data."""
    current: type[Model] | None = model
    rest = list(path)
    while rest and current is not None:
        step = rest.pop(0)
        child = None
        for name, field in current.model_fields.items():
            if manifest_name(name, field) == step:
                child = child_of(field)
        if child is None:
            return None
        if child.container is not None:
            if not rest:
                return None
            rest.pop(0)
        current = child.model
    return current
