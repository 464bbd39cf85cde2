"""Which program a component runs, and what runs in its place on this platform.

Manifests written for Dynamo name NVIDIA's images and start Dynamo's Python modules in them. What
decides is the module that is started, not the image's name (a frontend may come in any of the
images): a module that this platform has a program for is mapped, image and command together. An
engine without a launcher of ours (`vllm serve`) runs as it is. Everything else is kept exactly as
written and said to be unsupported.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from dynamo_operator.render import flags, notes, shell
from dynamo_operator.render.merge import entries
from dynamo_operator.render.platform import IMAGE_NAMES, OWN_REPOSITORY, Platform


class Family(Enum):
    """What a program is to the platform: decides ports, probes and variables."""

    FRONTEND = "frontend"
    LAUNCHER = "launcher"
    """An engine under our launcher: status server and worker stream beside HTTP."""
    STOCK = "stock"
    """vLLM's own server without a launcher: HTTP only."""
    EPP = "epp"
    PLANNER = "planner"
    FOREIGN = "foreign"
    """A program the platform knows nothing about; takes the ports and probes of its type."""


@dataclass(frozen=True, slots=True)
class Program:
    """One of our programs."""

    image: str
    """Its image, one of `IMAGE_NAMES`."""
    command: tuple[str, ...]
    family: Family
    rules: Mapping[str, flags.Rule]
    """What becomes of the flags of the Dynamo module that it replaces."""


FRONTEND = Program("frontend", ("dynamo", "frontend"), Family.FRONTEND, flags.FRONTEND)
VLLM = Program("vllm", ("dynamo", "worker", "vllm"), Family.LAUNCHER, flags.VLLM)
SIMULATOR = Program("worker", ("dynamo", "worker", "sim"), Family.LAUNCHER, flags.MOCKER)
EPP = Program("epp", ("dynamo", "epp"), Family.EPP, {})
PLANNER = Program("planner", ("dynamo", "planner", "run"), Family.PLANNER, {})

BY_IMAGE = {program.image: program for program in (FRONTEND, VLLM, SIMULATOR, EPP, PLANNER)}
BY_MODULE = {"frontend": FRONTEND, "vllm": VLLM, "mocker": SIMULATOR, "planner": PLANNER}
"""Dynamo's modules that a program of ours replaces: `python3 -m dynamo.<key>`."""

MODULE_TYPES = {"frontend": "frontend", "planner": "planner"} | dict.fromkeys(
    ("vllm", "mocker", "sglang", "trtllm"), "worker"
)
"""Component type of what runs a Dynamo module, where the component gives none."""

FAMILY_TYPES = {
    Family.FRONTEND: "frontend",
    Family.LAUNCHER: "worker",
    Family.STOCK: "worker",
    Family.EPP: "epp",
    Family.PLANNER: "planner",
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a component's main container runs. None leaves a field out of the container."""

    family: Family
    image: str | None
    command: list[str] | None
    args: list[str] | None
    role: str | None = None
    """"worker", "prefill" or "decode", where the flags say it."""
    type: str = ""
    """Component type that the program stands for; "" if it tells none."""
    own_image: str = ""
    """Which of our images it runs in, one of `IMAGE_NAMES`; "" for another's."""


_OWN_IMAGE = re.compile(
    rf"(?:^|/)dynamo-platform/({'|'.join(IMAGE_NAMES)})((?<=/vllm)-[^/:@]+)?(?:[:@]|$)"
)
_BARE_IMAGE = re.compile(rf"{OWN_REPOSITORY}((?:{'|'.join(IMAGE_NAMES)})(?:(?<=/vllm)-[^/:@]+)?)")
"""One of our images, named without registry and tag: whichever this installation has."""
_ENGINE_BUILD = re.compile(
    r"(?:^|/)vllm-(?:runtime|openai)(?P<name>-[^/:@]+)?"
    r"(?::v?[0-9.]+-(?!rc|(?:amd64|arm64)\b)(?P<tag>[^@]+)|[:@].*)?$"
)
"""An image of vLLM: another accelerator's has a longer name, another build's a longer tag."""
_STOCK_IMAGE = re.compile(r"(?:^|/)vllm-openai(?:[:@-]|$)")
_PYTHON = re.compile(r"(?:.*/)?python[0-9.]*")
_SHELL = re.compile(r"(?:.*/)?(?:ba|da|z|k)?sh")
_MODE = re.compile(r"--disaggregation[-_]mode[=\s\"',]+(prefill|decode)\b")
_IN_SCRIPT = {
    Family.LAUNCHER: re.compile(r"(?:^|[\s;&])dynamo\s+worker\s+(?:sim|vllm)\b"),
    Family.FRONTEND: re.compile(r"(?:^|[\s;&])dynamo\s+frontend\b"),
    Family.STOCK: re.compile(
        r"(?:^|[\s;&])(?:vllm\s+serve\s|python[0-9.]*\s+-m\s+vllm\.entrypoints\.openai)"
    ),
}
_MODULE_IN_SCRIPT = re.compile(r"-m\s+dynamo\.([a-z_]+)")


@dataclass(frozen=True, slots=True)
class _Invocation:
    """A container's command line, taken apart."""

    module: str = ""
    """Python module that is started."""
    tail: Sequence[shell.Word] = ()
    """Its arguments."""
    launch: shell.Launch | None = None
    """The script's last command, where a shell runs a Dynamo module."""
    script: str = ""
    """The script, where a shell runs one."""


def _invocation(argv: list[str]) -> _Invocation:
    head = argv[0] if argv else ""
    if _PYTHON.fullmatch(head):
        position = 1
        while position < len(argv) and argv[position] in ("-u", "-O", "-B", "-I", "-s", "-E"):
            position += 1
    else:
        position = 0
    if argv[position : position + 1] == ["-m"] and position + 1 < len(argv):
        tail = [shell.plain(arg) for arg in argv[position + 2 :]]
        return _Invocation(module=argv[position + 1], tail=tail)
    if _SHELL.fullmatch(head):
        for index, arg in enumerate(argv[1:-1], start=1):
            if not arg.startswith("-"):
                break
            if "c" in arg and not arg.startswith("--"):
                script = argv[index + 1]
                launch = shell.launch(script)
                module = launch.module if launch else ""
                return _Invocation(module, launch.words if launch else (), launch, script)
    return _Invocation()


def resolve(
    component: str,
    component_type: str,
    container: Mapping[str, Any],
    backend: str | None,
    platform: Platform,
    noted: notes.Notes,
) -> Runtime:
    """What `container` (`main` of a component of `component_type`, "" if it gives none) runs."""
    image = installed(container.get("image"), platform) or None
    found = _resolve(component, component_type, container, image, backend, platform, noted)
    own = _OWN_IMAGE.search(found.image) if found.image else None
    return replace(found, own_image=own[1]) if own else found


def installed(image: Any, platform: Platform) -> Any:
    """`image`; if it is one of ours without registry and tag, the installation's own."""
    bare = _BARE_IMAGE.fullmatch(image) if isinstance(image, str) else None
    return platform.image(bare[1]) if bare else image


def _resolve(
    component: str,
    component_type: str,
    container: Mapping[str, Any],
    image: str | None,
    backend: str | None,
    platform: Platform,
    noted: notes.Notes,
) -> Runtime:
    command = [str(part) for part in entries(container.get("command"))]
    args = [str(part) for part in entries(container.get("args"))]
    own = _OWN_IMAGE.search(image) if image else None
    prefix = platform.replacement_prefix(image) if image else platform.own_prefix
    found = _invocation(command + args)
    written = Runtime(
        Family.FOREIGN,
        image,
        command or None,
        args or None,
        role=_role(command + args),
        type=_type_of(found),
    )

    def unsupported(why: str) -> Runtime:
        noted.add(component, notes.RUNTIME_UNSUPPORTED, f"{why}; image and command stay as written")
        return written

    def changed(
        program: Program,
        new_command: list[str] | None,
        new_args: list[str],
        translation: flags.Translation,
    ) -> Runtime:
        runs = " ".join(program.command)
        target = _target(image, own, program, prefix, platform)
        if not image:
            noted.add(component, notes.IMAGE_DEFAULTED, f"main names no image; {target} runs")
        elif target != image:
            noted.add(component, notes.RUNTIME_MAPPED, f"image {image} → {target}, runs `{runs}`")
        elif found.module:
            message = f"`python3 -m {found.module}` → `{runs}`"
            noted.add(component, notes.RUNTIME_MAPPED, message)
        if translation.changes:
            message = f"flags for `{runs}`: {translation.changes}"
            noted.add(component, notes.FLAGS_TRANSLATED, message)
        if program is VLLM:
            _check_build(component, image, own, target, noted)
        family = program.family
        kind = FAMILY_TYPES[family]
        return Runtime(family, target, new_command, new_args or None, translation.role, kind)

    # A Dynamo module: map it if the image is one that we replace (or ours).
    if found.module.startswith("dynamo."):
        program = BY_MODULE.get(found.module.split(".")[1])
        if program is None:
            return unsupported(f"no program here replaces `{found.module}`")
        if own is None and prefix is None:
            return unsupported(f"image {image} is not mapped to one of this platform's")
        translation = flags.translate(found.tail, program.rules)
        if translation.unknown_mode is not None:
            mode = translation.unknown_mode or "without a value"
            return unsupported(f"--disaggregation-mode {mode} names no role known here")
        if program is VLLM:
            _check_connector(component, found.tail, noted)
        if found.launch is None:
            arguments = [word.raw for word in translation.words]
            return changed(program, list(program.command), arguments, translation)
        script = found.launch.script(" ".join(program.command), translation.words)
        new_command, new_args = _replaced(command, args, found.script, script)
        return changed(program, new_command, new_args, translation)
    if found.script and (hidden := _MODULE_IN_SCRIPT.search(found.script)):
        return unsupported(
            f"`python3 -m dynamo.{hidden[1]}` is not the last simple command of its script"
        )

    # Our own commands, and vLLM's server without a launcher.
    family = _written_family(command, args, found, image)
    if family is not None:
        target = image
        if family is Family.STOCK and own is None and prefix is not None:
            target = _target(image, own, VLLM, prefix, platform)
            if image:
                message = f"image {image} → {target}, command as written"
                noted.add(component, notes.RUNTIME_MAPPED, message)
            _check_build(component, image, own, target, noted)
        return Runtime(
            family,
            target,
            command or None,
            args or None,
            written.role,
            FAMILY_TYPES.get(family, ""),
        )

    # No command: the image's program, else the default of the component's type.
    if not command:
        if own:
            program = BY_IMAGE[own[1]]
            untouched = flags.Translation(role=written.role)
            return changed(program, list(program.command), args, untouched)
        default = _default(component_type, image, backend)
        if default is not None and prefix is not None:
            translation = flags.translate([shell.plain(arg) for arg in args], default.rules)
            arguments = [word.raw for word in translation.words]
            return changed(default, list(default.command), arguments, translation)
        if image is None:
            return unsupported("main names neither an image nor a command")
        return unsupported(f"image {image} is not mapped to one of this platform's")
    return unsupported(f"`{' '.join(command)[:80]}` is no program that this platform knows")


def _target(
    image: str | None,
    own: re.Match[str] | None,
    program: Program,
    prefix: str | None,
    platform: Platform,
) -> str:
    """The image of `program`: beside `image` if that is one of ours, else in its place.

    The engine for another accelerator stays another image: `vllm-runtime-xpu` → `vllm-xpu`.
    """
    if image is None:
        return platform.image(program.image, prefix)
    if own is None:
        build = _ENGINE_BUILD.search(image) if program is VLLM else None
        variant = (build["name"] or "") if build else ""
        return platform.image(program.image + variant, prefix)
    end = own.end(1) if program is VLLM or not own[2] else own.end(2)
    return image[: own.start(1)] + program.image + image[end:]


def _check_build(
    component: str,
    image: str | None,
    own: re.Match[str] | None,
    target: str,
    noted: notes.Notes,
) -> None:
    """Say it where `image` held another engine than the plain one, which `target` has to be too."""
    if image is None or own is not None:
        return
    known = _ENGINE_BUILD.search(image)
    if known and not (known["name"] or known["tag"]):
        return
    noted.add(
        component,
        notes.ENGINE_BUILD,
        f"{image} holds a special build of vLLM; {target} has to hold the same",
    )


def _type_of(found: _Invocation) -> str:
    module = found.module
    if not module and (hidden := _MODULE_IN_SCRIPT.search(found.script)):
        module = f"dynamo.{hidden[1]}"
    return MODULE_TYPES.get(module.split(".")[1], "") if module.startswith("dynamo.") else ""


def _role(argv: list[str]) -> str | None:
    """The role that `--disaggregation-mode` gives anywhere in a command line we don't map."""
    found = _MODE.search(" ".join(argv))
    return found[1] if found else None


def _written_family(
    command: list[str], args: list[str], found: _Invocation, image: str | None
) -> Family | None:
    """The family of a command line that runs as written; None if it is not known."""
    argv = command + args
    if found.module.split(".")[0] == "vllm":
        return Family.STOCK
    if found.script:
        for family, pattern in _IN_SCRIPT.items():
            if pattern.search(found.script):
                return family
        return None
    if command:
        tool = argv[0].rpartition("/")[2]
        if tool == "vllm" and argv[1:2] == ["serve"]:
            return Family.STOCK
        if tool == "dynamo":
            for program in BY_IMAGE.values():
                if tuple(argv[1 : len(program.command)]) == program.command[1:]:
                    return program.family
        return None
    if image and _STOCK_IMAGE.search(image):
        return Family.STOCK
    return None


def _default(component_type: str, image: str | None, backend: str | None) -> Program | None:
    """The program of a component whose main container has no command."""
    match component_type:
        case "frontend":
            return FRONTEND
        case "epp":
            return EPP
        case "planner":
            return PLANNER if image is None else None
        case "worker" | "prefill" | "decode":
            if image is None:
                return VLLM if backend in (None, "vllm") else None
            return VLLM if image.rpartition("/")[2].startswith("vllm-runtime") else None
    return None


def _replaced(
    command: list[str], args: list[str], old: str, new: str
) -> tuple[list[str] | None, list[str]]:
    """Command and args with the script exchanged."""
    if old in command:
        position = command.index(old)
        return [*command[:position], new, *command[position + 1 :]], args
    position = args.index(old)
    return command or None, [*args[:position], new, *args[position + 1 :]]


def _check_connector(component: str, words: Sequence[shell.Word], noted: notes.Notes) -> None:
    for word in words:
        if "kvbm" in word.raw or "DynamoConnector" in word.raw:
            noted.add(
                component,
                notes.CONNECTOR_UNSUPPORTED,
                "--kv-transfer-config names a connector of Dynamo's KV block manager, which the"
                " mapped image does not hold",
            )
            return
