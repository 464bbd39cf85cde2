"""Profile files: where they lie, and which role each is for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dynamo_runtime.timing_profile import InvalidProfile, TimingProfile, load

from dynamo_planner.config.model import Role

SUFFIXES = (".json", ".yaml", ".yml")
NAME = "timing-profile"


@dataclass(frozen=True, slots=True)
class Profiles:
    """What was found."""

    prefill: TimingProfile | None = None
    decode: TimingProfile | None = None
    note: str = ""  # where from, or why nothing

    def of(self, role: Role) -> TimingProfile | None:
        return self.prefill if role == "prefill" else self.decode


def load_profiles(path: Path) -> Profiles:
    """The profiles at ``path``: a file for all roles, or a folder (see `profile_results_dir`).

    What is not there is no error, only a note: the other models may do. Raises ``InvalidProfile``
    for one that can't be understood.
    """
    if path.is_file():
        both = load(path)
        return Profiles(both, both, f"profile {path}")
    if not path.is_dir():
        return Profiles(note=f"no profile: {path} is neither a file nor a folder")
    found = {name: _load(path, name) for name in (NAME, "prefill", "decode")}
    prefill, decode = found["prefill"] or found[NAME], found["decode"] or found[NAME]
    if prefill is None and decode is None:
        if any(path.rglob("*.npz")):
            raise InvalidProfile(
                f"{path}: .npz files of Dynamo's profiler are not read; write {NAME}.json: "
                '{"prefill_tokens_per_s": …, "prefill_overhead_s": …, '
                '"decode": [{"batch": 1, "step_s": …}, …]}'
            )
        return Profiles(note=f"no profile: {path} has no {NAME}.json or .yaml")
    return Profiles(prefill, decode, f"profiles in {path}")


def _load(folder: Path, name: str) -> TimingProfile | None:
    for suffix in SUFFIXES:
        if (file := folder / f"{name}{suffix}").is_file():
            return load(file)
    return None
