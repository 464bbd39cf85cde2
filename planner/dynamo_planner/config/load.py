"""From `--config` to a checked configuration: a file, or the object itself.

Every mistake is told at once, with its place and what would be right; what is accepted and does
something else here, or nothing, comes back as a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dynamo_crds.load import Document, read_documents
from dynamo_crds.problem import Finding, InvalidManifest, Problem, findings

from dynamo_planner.config.environment import from_environment
from dynamo_planner.config.foreign import REFUSED, REFUSED_VALUES, RENAMED, WITHOUT_COUNTERPART
from dynamo_planner.config.model import PlannerConfig

INLINE = "--config"
"""How problems name a configuration that is no file."""


@dataclass(frozen=True, slots=True)
class GivenConfig:
    """What was given, checked."""

    config: PlannerConfig
    notes: tuple[str, ...] = ()
    """What is accepted and does something else here, or nothing; one sentence each."""


def given_config(argument: str, env: Mapping[str, str] = MappingProxyType({})) -> GivenConfig:
    """The configuration in ``argument``: a path of a JSON or YAML file, or JSON or YAML itself.

    "" is all defaults; ``env`` is the environment, for the keys that have variables. Raises
    ValueError (`InvalidManifest` for what is wrong in it) with a message for its user.
    """
    text, name = argument, INLINE
    is_object = any(mark in argument for mark in ("{", ": ", "\n"))
    if argument.strip() and not is_object:
        path = Path(argument)
        name = str(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text in UTF-8 (byte {error.start})") from error
        except OSError as error:
            raise ValueError(
                f"--config {path}: {error.strerror or error}; give a file or an object "
                'such as \'{"mode": "agg"}\''
            ) from error
    return load_config(text, name, from_environment(env))


def load_config(
    text: str, file: str = INLINE, otherwise: Mapping[str, Any] = MappingProxyType({})
) -> GivenConfig:
    """``file`` is the name that problems show, ``otherwise`` what holds for keys that ``text`` does
    not give. Raises `InvalidManifest`."""
    documents, problems = read_documents(text, file)
    for document in documents:
        problems.extend(document.problems)
    if problems:
        raise InvalidManifest(problems)
    document = documents[0] if documents else Document(file, 0, {})
    if len(documents) > 1 or not isinstance(document.data, dict):
        found = "several objects" if len(documents) > 1 else "no object"
        raise InvalidManifest([Problem(file, 0, "", None, "one object of keys", found)])
    return _checked(document, otherwise)


def _checked(document: Document, otherwise: Mapping[str, Any]) -> GivenConfig:
    data: dict[str, Any] = {}
    found: list[Finding] = []
    notes = []
    for key, value in document.data.items():
        name = RENAMED.get(key, key)
        if value is None:
            continue
        if name in data:
            found.append(Finding((key,), value, f"only {name}", "the same key under two names"))
        elif why := _refusal(name, value):
            found.append(Finding((key,), value, "the key left out", why))
        elif name == "scheduling":
            found.extend(_scheduling(value))
            notes.append("scheduling has no effect: the loops have intervals of their own")
        elif name == "enable_power_awareness":
            continue
        elif name in WITHOUT_COUNTERPART:
            notes.append(f"{key} has no effect: {WITHOUT_COUNTERPART[name]}")
        else:
            data[name] = value
    data = {**otherwise, **data}
    found += findings(PlannerConfig, data)
    if found:
        raise InvalidManifest(map(document.problem, found))
    config = PlannerConfig.model_validate(data)
    return GivenConfig(config, (*notes, *_silent(config, data)))


def _refusal(key: str, value: Any) -> str:
    if key in REFUSED:
        return REFUSED[key]
    values = REFUSED_VALUES.get(key, {})
    return next(
        (why for bad, why in values.items() if bad == value and type(bad) is type(value)), ""
    )


def _scheduling(value: Any) -> Iterator[Finding]:
    """Plugins may hold a limit that somebody relies on."""
    if isinstance(value, dict) and value.get("external_plugins"):
        path = ("scheduling", "external_plugins")
        yield Finding(path, value["external_plugins"], "the key left out", "no plugins are called")


def _silent(config: PlannerConfig, data: dict[str, Any]) -> Iterator[str]:
    """Keys that their author will think do something in this combination."""
    target = config.optimization_target
    if target != "sla":
        for key in ("ttft_ms", "itl_ms", "enable_throughput_scaling", "enable_load_scaling"):
            if key in data:
                yield f"{key} has no effect: optimization_target is {target}, not sla"
    if target != "load":
        for key in sorted(data):
            if key.startswith(("prefill_scale_", "decode_scale_")):
                yield f"{key} has no effect: optimization_target is {target}, not load"
    if config.load_predictor == "prophet":
        yield "load_predictor prophet is answered by holt-winters, which foresees seasons too"
