"""A run as a file, and the same run again from that file.

One JSON object a line: first what it ran with, then for each look what came in and what was
decided. A replay decides anew from what came in and compares the bytes of what it decided. NaN and
infinite figures are written as null, which means the same to the planner: not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from dynamo_runtime import __version__

from dynamo_planner.config import GivenConfig
from dynamo_planner.config.load import load_config
from dynamo_planner.config.model import PlannerConfig, Role
from dynamo_planner.decision import Decision
from dynamo_planner.performance import Profiles
from dynamo_planner.predict import Sample
from dynamo_planner.state import Inputs, State
from dynamo_planner.step import step


class InvalidRecording(ValueError):
    """A file that is no recording; the message names the line."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a run began with."""

    config: Mapping[str, Any]
    profiles: Profiles = field(default_factory=Profiles)
    history: Mapping[Role, tuple[Sample, ...]] = field(default_factory=dict)
    version: str = __version__
    format: Literal["dynamo-planner-recording/1"] = "dynamo-planner-recording/1"

    @classmethod
    def of(cls, config: PlannerConfig, state: State) -> Head:
        """``state`` is the one that the run begins with."""
        history = {role: each.history for role, each in state.roles.items() if each.history}
        return cls(config.model_dump(mode="json", exclude_none=True), state.profiles, history)

    def begin(self) -> tuple[GivenConfig, State]:
        """Raises `InvalidManifest` for a configuration that this version does not take."""
        text = msgspec.json.encode(self.config).decode()
        return load_config(text, "recording"), State.begin(self.profiles, self.history)


@dataclass(frozen=True, slots=True)
class Look:
    """One look."""

    inputs: Inputs
    decision: Decision
    wall: str = ""
    """Time of day, for people; decides nothing."""


def head_line(head: Head) -> bytes:
    return msgspec.json.encode(head) + b"\n"


def look_line(look: Look) -> bytes:
    return msgspec.json.encode(look) + b"\n"


@dataclass(frozen=True, slots=True)
class Replayed:
    """One look of a recording, decided anew."""

    number: int  # from 1
    look: Look  # as it was recorded
    decision: Decision  # as it is now

    @property
    def same(self) -> bool:
        """Whether both have the same bytes."""
        return msgspec.json.encode(self.decision) == msgspec.json.encode(self.look.decision)


def replay(lines: Iterable[bytes], name: str = "recording") -> Iterator[Replayed]:
    """Decide a recording anew, look by look. Raises ``InvalidRecording``.

    A last line without an end is what a killed planner leaves, and is left out.
    """
    config: PlannerConfig | None = None
    state = State()
    for number, line in enumerate(lines):
        if not line.endswith(b"\n"):
            return
        try:
            if config is None:
                given, state = msgspec.json.decode(line, type=Head).begin()
                config = given.config
                continue
            look = msgspec.json.decode(line, type=Look)
        except (msgspec.DecodeError, ValueError) as error:
            raise InvalidRecording(f"{name}, line {number + 1}: {error}") from error
        state, decision = step(state, look.inputs, config)
        yield Replayed(number, look, decision)
    if config is None:
        raise InvalidRecording(f"{name}: the file is empty")
