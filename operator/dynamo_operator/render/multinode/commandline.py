"""A container's command line: its engine's words to read, and ways to say more.

Either a plain argument list, or a `sh -c` script that ends in the engine's command. As in `shell`,
a script of which that can't be told for sure is left alone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Self

from dynamo_operator.render import shell
from dynamo_operator.render.merge import Json, entries
from dynamo_operator.render.shell import Word

_SHELL = re.compile(r"(?:.*/)?(?:ba|da|z|k)?sh")
_ENGINE = re.compile(
    r"(?:^|[\n;]|&&)[ \t]*"
    r"(?:[A-Za-z_]\w*=[\w./:-]*[ \t]+)*"  # variables for this command
    r"(?P<command>(?:exec[ \t]+)?(?:[\w./-]*/)?"
    r"(?:python[0-9.]*[ \t]+-m[ \t]+[\w.]+|dynamo[ \t]+worker[ \t]+\w+|vllm[ \t]+serve))"
    r"(?=[ \t\n\\]|$)"
)
_PROGRAM = re.compile(
    r"(?:.*/)?(?:python[0-9.]*( -\w)* -m [\w.]+|dynamo worker \w+|vllm serve)(?= |$)"
)


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What a container runs, taken apart: `before`, `program`, `words`."""

    program: tuple[Word, ...]
    """The engine's program, down to where its own arguments begin."""
    words: tuple[Word, ...]
    """Its arguments."""
    before: str | None = None
    """What the script does before that; None for a plain argument list."""
    shell: tuple[str, ...] = ()
    """The shell that runs the script, with its flags."""

    @classmethod
    def of(cls, container: Mapping[str, Any]) -> Self | None:
        """The command line of `container`; None where it can't be told for sure. A container
        without a command has an empty program: the image's own."""
        command = [str(part) for part in entries(container.get("command"))]
        argv = command + [str(part) for part in entries(container.get("args"))]
        if argv and _SHELL.fullmatch(argv[0]):
            return cls._of_script(argv)
        length = 0
        if command:
            found = _PROGRAM.match(" ".join(argv))
            if found is None or found[0].split(" ") != argv[: found[0].count(" ") + 1]:
                return None
            length = found[0].count(" ") + 1
        words = [shell.plain(arg) for arg in argv]
        return cls(tuple(words[:length]), tuple(words[length:]))

    @classmethod
    def _of_script(cls, argv: Sequence[str]) -> Self | None:
        position = next((i for i, arg in enumerate(argv[1:], 1) if not arg.startswith("-")), 0)
        if not position or position != len(argv) - 1 or "c" not in argv[position - 1]:
            return None
        script = argv[position]
        found = None
        for found in _ENGINE.finditer(script):  # noqa: B007 - the last one counts
            pass
        words = shell.split(script[found.end() :]) if found is not None else None
        if found is None or words is None:
            return None
        program = shell.split(found["command"]) or []
        if program and program[0].raw == "exec":
            program = program[1:]
        before = script[: found.start("command")]
        return cls(tuple(program), tuple(words), before, tuple(argv[:position]))

    @property
    def text(self) -> str:
        """Program and words as a shell reads them."""
        return " ".join(_in_script(word) for word in (*self.program, *self.words))

    def value(self, *flags: str) -> str | None:
        """The last value given for a flag by any of its names; None if there is none, or it
        depends on a variable."""
        found: str | None = None
        for word, after in zip_longest(self.words, self.words[1:]):
            text = word.value if word.value is not None else word.raw
            name, equals, inline = text.partition("=")
            if name.replace("_", "-") in flags:
                found = inline if equals else after.value if after is not None else None
        return found

    def number(self, *flags: str) -> int:
        """The flag's value as a size; 1 where none can be read."""
        value = self.value(*flags)
        return int(value) if value and value.isascii() and value.isdigit() and int(value) else 1

    def has(self, *flags: str) -> bool:
        return any(
            (word.value or word.raw).partition("=")[0].replace("_", "-") in flags
            for word in self.words
        )

    def adding(self, *flags: tuple[str, ...]) -> Self:
        """The same with further flags, without those that are given already."""
        more = [shell.plain(part) for flag in flags if not self.has(flag[0]) for part in flag]
        return self._with(words=(*self.words, *more))

    def running(self, program: Sequence[str], words: Sequence[Word]) -> Self:
        """The same with another program and other words."""
        return self._with(tuple(shell.plain(part) for part in program), tuple(words))

    def after(self, command: str) -> Self:
        """A script that runs the shell command `command` first and ends if that fails."""
        return self._with(
            before=f"{command} || exit 1\n{self.before or ''}", runner=self.shell or ("sh", "-c")
        )

    def in_shell(self) -> Self:
        """The same as a script, so that a shell computes `$((…))`."""
        return self if self.shell else self._with(before="", runner=("sh", "-c"))

    def _with(
        self,
        program: tuple[Word, ...] | None = None,
        words: tuple[Word, ...] | None = None,
        before: str | None = None,
        runner: tuple[str, ...] | None = None,
    ) -> Self:
        return type(self)(
            self.program if program is None else program,
            self.words if words is None else words,
            self.before if before is None else before,
            self.shell if runner is None else runner,
        )

    def on(self, container: Mapping[str, Any]) -> Json:
        """`container` running this."""
        changed = {**container}
        if self.shell:
            changed["command"] = list(self.shell)
            changed["args"] = [f"{self.before or ''}exec {self.text}"]
        else:
            changed["command"] = [word.raw for word in self.program]
            changed["args"] = [word.raw for word in self.words]
        for key in ("command", "args"):
            if not changed[key]:
                del changed[key]
        return changed


def _in_script(word: Word) -> str:
    """A word as a script needs it: what came from an argument list (its raw text is its value) is
    quoted, except `$((…))`, which is ours; what came from a script stays."""
    if word.value is None or word.raw != word.value or word.raw.startswith("$(("):
        return word.raw
    return shell.quoted(word.raw).raw
