"""A container's environment, as the kubelet would make it.

Manifests lean on the kubelet's exact rules (``$(VAR)`` sees only what was defined before it, an
unknown reference stays as it is, ``$$`` escapes, ``env`` wins over ``envFrom``). A runner that
differs in one of them starts other programs than the cluster does.

Rules: Kubernetes' "Define Dependent Environment Variables" and the Pod API reference (``EnvVar``,
``EnvFromSource``, ``Container.command``).
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any


class Unresolved(Exception):
    """A reference that can't be resolved; the message names the variable and the reason."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace ``$(NAME)`` by its value; ``$$`` is a literal ``$``; an unknown name stays."""
    out: list[str] = []
    position = 0
    while (dollar := text.find("$", position)) != -1 and dollar + 1 < len(text):
        out.append(text[position:dollar])
        following = text[dollar + 1]
        if following == "$":
            out.append("$")
            position = dollar + 2
        elif following == "(" and (close := text.find(")", dollar + 2)) != -1:
            name = text[dollar + 2 : close]
            out.append(variables.get(name, f"$({name})"))
            position = close + 1
        else:
            out.append(text[dollar : dollar + 2])
            position = dollar + 2
    out.append(text[position:])
    return "".join(out)


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What ``fieldRef`` may ask of a pod."""

    name: str
    namespace: str
    uid: str
    ip: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    service_account: str = "default"
    node: str = "localhost"


@dataclass(frozen=True, slots=True)
class Machine:
    """What a container without limits may use: the machine. cpu in cores, memory in bytes."""

    cpus: int
    memory: int


_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]\Z")


def field_value(path: str, pod: PodFacts) -> str:
    """The value of a ``fieldRef``. Raises ``Unresolved`` for a path that pods don't have."""
    if match := _SUBSCRIPT.match(path):
        source = pod.labels if match[1] == "labels" else pod.annotations
        return source.get(match[2], "")
    plain = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "metadata.uid": pod.uid,
        "spec.nodeName": pod.node,
        "spec.serviceAccountName": pod.service_account,
        "status.podIP": pod.ip,
        "status.podIPs": pod.ip,
        "status.hostIP": pod.ip,
        "status.hostIPs": pod.ip,
    }
    if path not in plain:
        raise Unresolved(f"fieldRef {path!r} is not a field of a pod that can be referenced")
    return plain[path]


_SUFFIXES = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12),
    "P": Decimal(10**15), "E": Decimal(10**18),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
    "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip
_QUANTITY = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)\Z")


def quantity(text: str | int | float) -> Decimal:
    """A Kubernetes quantity (``500m``, ``2Gi``, ``1e3``) as a number of its base unit."""
    match = _QUANTITY.match(str(text))
    if match and match[2] in _SUFFIXES:
        try:
            return Decimal(match[1]) * _SUFFIXES[match[2]]
        except InvalidOperation:
            pass
    raise Unresolved(f"{text!r} is not a quantity such as 500m, 2 or 4Gi")


def resource_value(
    reference: Mapping[str, Any], resources: Mapping[str, Any], machine: Machine
) -> str:
    """The value of a ``resourceFieldRef``: the amount over its divisor, rounded up.

    Without a limit it is what the machine has; without a request it is the limit.
    """
    kind, _, name = str(reference.get("resource", "")).partition(".")
    if kind not in ("limits", "requests") or not name:
        raise Unresolved(
            f"resourceFieldRef {reference.get('resource')!r} is not limits.* or requests.*"
        )
    limits: Mapping[str, Any] = resources.get("limits") or {}
    requests: Mapping[str, Any] = resources.get("requests") or {}
    amount = limits.get(name) if kind == "limits" else requests.get(name, limits.get(name, 0))
    if amount is None:
        amount = {"cpu": machine.cpus, "memory": machine.memory}.get(name, 0)
    # "0" is Kubernetes' own way of writing "no divisor given".
    divisor = quantity(reference.get("divisor") or 1) or Decimal(1)
    return str(math.ceil(quantity(amount) / divisor))


@dataclass(frozen=True, slots=True)
class Objects:
    """The ConfigMaps and Secrets a pod may refer to, and the caller's own environment.

    A Secret that the file doesn't hold may still be given by the caller, as an environment
    variable with the key's name: that is how a token gets to a laptop without being written down.
    """

    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    caller: Mapping[str, str] = field(default_factory=dict)


def secret_data(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The values of a Secret manifest, decoded; ``stringData`` wins over ``data``."""
    values: dict[str, str] = {}
    for key, encoded in (manifest.get("data") or {}).items():
        try:
            values[key] = base64.b64decode(encoded, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, TypeError, ValueError) as error:
            name = (manifest.get("metadata") or {}).get("name")
            raise Unresolved(f"Secret {name!r}: data.{key} is not base64 of text") from error
    values.update(manifest.get("stringData") or {})
    return values


def _key(source: Mapping[str, Any], variable: str, kind: str, objects: Objects) -> str | None:
    """The value behind a configMapKeyRef or secretKeyRef; ``None`` if optional and absent."""
    name, key = str(source.get("name", "")), str(source.get("key", ""))
    known = objects.config_maps if kind == "ConfigMap" else objects.secrets
    value = known.get(name, {}).get(key)
    if value is None and kind == "Secret":
        value = objects.caller.get(key, objects.caller.get(variable))
    if value is not None:
        return value
    if source.get("optional"):
        return None
    if kind == "Secret":
        raise Unresolved(
            f"variable {variable}: Secret {name!r} is not in the file; "
            f"set {key} in your environment, or put the Secret into the file"
        )
    problem = f"has no key {key!r}" if name in known else "is not in the file"
    raise Unresolved(f"variable {variable}: ConfigMap {name!r} {problem}")


def environment(
    container: Mapping[str, Any],
    pod: PodFacts,
    objects: Objects,
    machine: Machine,
) -> tuple[dict[str, str], list[str]]:
    """The variables a container's ``envFrom`` and ``env`` define, and notes for the user.

    ``envFrom`` first, in order, then ``env``, in order; a ``value`` sees what came before it.
    """
    variables: dict[str, str] = {}
    notes: list[str] = []
    for source in container.get("envFrom") or ():
        prefix = source.get("prefix") or ""
        for kind, field_name, known in (
            ("ConfigMap", "configMapRef", objects.config_maps),
            ("Secret", "secretRef", objects.secrets),
        ):
            reference = source.get(field_name)
            if reference is None:
                continue
            name = str(reference.get("name", ""))
            values = known.get(name)
            if values is None:
                if kind == "ConfigMap" and not reference.get("optional"):
                    raise Unresolved(f"envFrom: ConfigMap {name!r} is not in the file")
                if not reference.get("optional"):
                    notes.append(
                        f"Secret {name!r} is not in the file: running without its variables"
                    )
                continue
            # A key that can't be a variable's name is skipped, as the kubelet does.
            variables |= {prefix + k: v for k, v in values.items() if k and "=" not in k}
    for entry in container.get("env") or ():
        name = str(entry["name"])
        value: str | None = str(entry.get("value") or "")
        source = entry.get("valueFrom")
        if value:
            value = expand(value, variables)
        elif source:
            value = _value_from(name, source, container, pod, objects, machine)
        if value is not None:
            variables[name] = value
    return variables, notes


def _value_from(
    name: str,
    source: Mapping[str, Any],
    container: Mapping[str, Any],
    pod: PodFacts,
    objects: Objects,
    machine: Machine,
) -> str | None:
    if reference := source.get("fieldRef"):
        return field_value(str(reference.get("fieldPath", "")), pod)
    if reference := source.get("resourceFieldRef"):
        return resource_value(reference, container.get("resources") or {}, machine)
    if reference := source.get("configMapKeyRef"):
        return _key(reference, name, "ConfigMap", objects)
    if reference := source.get("secretKeyRef"):
        return _key(reference, name, "Secret", objects)
    kinds = ", ".join(source) or "nothing"
    raise Unresolved(f"variable {name}: valueFrom {kinds} needs a cluster")


def command_line(parts: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """A ``command`` or ``args`` with its references replaced."""
    return [expand(str(part), variables) for part in parts]
