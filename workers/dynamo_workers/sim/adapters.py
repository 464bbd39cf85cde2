"""LoRA adapters that the simulated engine pretends to have.

They change what a prompt's blocks are and what is answered, and only so many fit into a batch: what
a picker has to know of them. They are given at the start; vLLM's routes that load others are left
out.
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

FLAG = "--lora-modules"


class Adapter(NamedTuple):
    """One adapter."""

    name: str
    """What requests name instead of a model."""
    path: str
    """Enters the hashes of its blocks, as in vLLM; nothing is read there."""
    number: int
    """From 1, in the order given; `lora_id` of events."""


class _Module(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's form of one adapter in JSON."""

    name: str
    path: str
    base_model_name: str | None = None


def parse(given: Iterable[str]) -> tuple[Adapter, ...]:
    """The values of `--lora-modules`, each `NAME=PATH` or JSON.

    Raises ValueError naming the value.
    """
    adapters: list[Adapter] = []
    for text in given:
        if text.startswith("{"):
            try:
                module = msgspec.json.decode(text, type=_Module)
            except msgspec.DecodeError as error:
                raise ValueError(f"{FLAG} {text!r}: {error}") from error
            name, path = module.name, module.path
        else:
            name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(
                f"{FLAG} {text!r}: use NAME=PATH, or "
                '{"name": "NAME", "path": "PATH", "base_model_name": "MODEL"}'
            )
        if name in {adapter.name for adapter in adapters}:
            raise ValueError(f"{FLAG} {text!r}: there is an adapter of this name already")
        adapters.append(Adapter(name, path, len(adapters) + 1))
    return tuple(adapters)
