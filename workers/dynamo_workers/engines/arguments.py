"""An engine's command line as its user wrote it: read, replaced and passed on flag by flag.

The launcher knows a handful of flags and must not know the others: a new release of an engine
brings dozens. So this is no parser of the whole line. It finds a flag by name, in the spellings
vLLM accepts (``--a-b x``, ``--a_b x``, ``--a-b=x``), and leaves everything else as it was.
"""

from __future__ import annotations

from collections.abc import Sequence


class BadArguments(ValueError):
    """The user's command line can't work. The message says which flag, and what to do."""


def _name(argument: str) -> str:
    """``--served_model_name=x`` → ``--served-model-name``; ``""`` for what is no flag."""
    if not _is_flag(argument):
        return ""
    return argument.partition("=")[0].replace("_", "-")


def _is_flag(argument: str) -> bool:
    # A negative number is a value.
    return argument.startswith("-") and not argument[1:2].isdigit()


class Arguments:
    """The arguments; the model may stand first without a flag, as for ``vllm serve``."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._list = list(arguments)
        if self._list and not self._list[0].startswith("-"):
            self._list.insert(0, "--model")

    @property
    def line(self) -> tuple[str, ...]:
        return tuple(self._list)

    def _spans(self, flag: str) -> list[tuple[int, int]]:
        """(start, end) of each use of ``flag`` with its values."""
        spans = []
        for start, argument in enumerate(self._list):
            if _name(argument) == flag:
                end = start + 1
                if "=" not in argument:
                    while end < len(self._list) and not _is_flag(self._list[end]):
                        end += 1
                spans.append((start, end))
        return spans

    def has(self, flag: str) -> bool:
        return bool(self._spans(flag))

    def values(self, flag: str) -> list[str]:
        """The values of the last use of ``flag``; empty if it isn't used or takes none."""
        spans = self._spans(flag)
        if not spans:
            return []
        start, end = spans[-1]
        _, equals, value = self._list[start].partition("=")
        return [value] if equals else self._list[start + 1 : end]

    def value(self, flag: str) -> str:
        """The value of the last use of ``flag``; ``""`` if it isn't used."""
        return (self.values(flag) or [""])[0]

    def number(self, flag: str) -> int:
        """The whole number given to ``flag``, 0 if it isn't used. Raises ``BadArguments``."""
        value = self.value(flag)
        if not value:
            return 0
        try:
            return int(value)
        except ValueError:
            raise BadArguments(f"{flag}: {value!r} is not a whole number") from None

    def remove(self, flag: str) -> list[str]:
        """Remove every use of ``flag``; return the values of the last one."""
        values = self.values(flag)
        for start, end in reversed(self._spans(flag)):
            del self._list[start:end]
        return values

    def add(self, *arguments: str) -> None:
        self._list += arguments

    def flags_under(self, flag: str) -> list[str]:
        """The dotted forms in use, such as ``--kv-events-config.topic``."""
        names = (_name(argument) for argument in self._list)
        return sorted({name for name in names if name.startswith(flag + ".")})

    def rename(self, flag: str, to: str) -> None:
        """Call ``flag`` by another name, values kept."""
        for start, _ in self._spans(flag):
            _, equals, value = self._list[start].partition("=")
            self._list[start] = f"{to}{equals}{value}"
