"""Finding the one program that a `sh -c` script runs in the end.

Real graphs start their engines from scripts: a few lines of preparation (`ulimit`, checks), then
one command with its flags on continued lines. The last command can be rewritten only where it is
surely a simple one. This is no shell parser: whatever is not plainly words, quotes and
`$VARIABLE`s to the very end of the script is left alone.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

_BLANKS = " \t"
_VARIABLE = re.compile(
    r"\$(?:[A-Za-z_][A-Za-z0-9_]*|\{[^{}`$\n]*\}|\([-._A-Za-z][-._A-Za-z0-9]*\))"
)
"""`$NAME`, `${NAME…}`, and Kubernetes' `$(NAME)`, which is replaced before a shell sees it."""

_PYTHON = re.compile(
    r"(?:^|[\n;]|&&)[ \t]*"
    r"(?:[A-Za-z_]\w*=[\w./:-]*[ \t]+)*"  # variables for this command
    r"(?P<command>(?:exec[ \t]+)?(?:[\w./-]*/)?python[0-9.]*[ \t]+-m[ \t]+"
    r"(?P<module>dynamo\.[a-z_.]+))"
    r"(?=[ \t\n\\]|$)"
)


class Word(NamedTuple):
    """One word of a command line."""

    raw: str
    """As written, with quotes."""
    value: str | None
    """What the program will see; None where it depends on a variable."""


def plain(text: str) -> Word:
    """The word of an argument list, where nothing is quoted or expanded."""
    return Word(text, text)


def quoted(value: str) -> Word:
    """A word that a shell reads as exactly `value`."""
    if value and not re.search(r"[^\w@%+=:,./-]", value, re.ASCII):
        return Word(value, value)
    return Word("'" + value.replace("'", "'\"'\"'") + "'", value)


@dataclass(frozen=True, slots=True)
class Launch:
    """The last command of a script: `<before><python -m module> <words>`."""

    before: str
    module: str
    words: tuple[Word, ...]

    def script(self, command: str, words: list[Word]) -> str:
        """The script with `command` and `words` in place of its last command. The command
        replaces the shell (`exec`), so that signals reach it."""
        return " ".join([f"{self.before}exec {command}", *(word.raw for word in words)])


def launch(script: str) -> Launch | None:
    """The Dynamo module that `script` runs as its last, simple command; None if there is none
    or it can't be told for sure."""
    match = None
    for match in _PYTHON.finditer(script):  # noqa: B007 - the last one counts
        pass
    if match is None:
        return None
    words = split(script[match.end() :])
    if words is None:
        return None
    return Launch(script[: match.start("command")], match["module"], tuple(words))


def split(text: str) -> list[Word] | None:
    """The words of a simple command, or None where `text` holds more than that: operators,
    redirections, substitutions, globs, comments, several lines, open quotes."""
    words: list[Word] = []
    raw: list[str] = []
    value: list[str] = []
    known = True
    open_word = False
    position, end = 0, len(text)
    stripped_end = len(text.rstrip(" \t\n"))

    while position < end:
        char = text[position]
        if text.startswith("\\\n", position):
            position += 2
        elif char in _BLANKS or (char == "\n" and position >= stripped_end):
            if open_word:
                words.append(Word("".join(raw), "".join(value) if known else None))
                raw, value, known, open_word = [], [], True, False
            position += 1
        elif char == "'":
            close = text.find("'", position + 1)
            if close < 0:
                return None
            raw.append(text[position : close + 1])
            value.append(text[position + 1 : close])
            open_word, position = True, close + 1
        elif char == '"':
            inner = _double_quoted(text, position + 1)
            if inner is None:
                return None
            close, content = inner
            raw.append(text[position : close + 1])
            if content is None:
                known = False
            else:
                value.append(content)
            open_word, position = True, close + 1
        elif char == "$":
            match = _VARIABLE.match(text, position)
            if match is None:
                return None
            raw.append(match[0])
            known, open_word, position = False, True, match.end()
        elif char == "\\":
            if position + 1 >= end:
                return None
            raw.append(text[position : position + 2])
            value.append(text[position + 1])
            open_word, position = True, position + 2
        elif char in "\n;|&<>()`*?[]" or (char in "#~" and not open_word):
            return None
        else:
            raw.append(char)
            value.append(char)
            open_word, position = True, position + 1
    if open_word:
        words.append(Word("".join(raw), "".join(value) if known else None))
    return words


def _double_quoted(text: str, start: int) -> tuple[int, str | None] | None:
    """Position of the closing quote and the content (None if it holds a variable)."""
    content: list[str] = []
    known = True
    position = start
    while position < len(text):
        char = text[position]
        if char == '"':
            return position, "".join(content) if known else None
        if char == "`":
            return None
        if char == "\\" and position + 1 < len(text):
            following = text[position + 1]
            if following in '$`"\\':
                content.append(following)
            elif following != "\n":
                content.append(char + following)
            position += 2
        elif char == "$" and position + 1 < len(text) and text[position + 1] not in '" \t':
            match = _VARIABLE.match(text, position)
            if match is None:
                return None
            known = False
            position = match.end()
        else:
            content.append(char)
            position += 1
    return None
