"""How texts become one short line that `kubectl get` can show."""

import json
import re
from collections.abc import Iterable

MESSAGE_LIMIT = 512
"""Characters of a condition's message: enough for a cause and what to do, short enough for a line
(Kubernetes would allow 32768)."""

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
_REASON = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")


def one_line(text: str) -> str:
    """`text` without colours and control characters, white space as single spaces."""
    plain = _ANSI.sub("", text)
    return " ".join("".join(c if c.isprintable() else " " for c in plain).split())


def bounded(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """`text`, or its beginning and an ellipsis: at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def last_words(text: str, limit: int = 200) -> str:
    """The end of a container's log: whole last lines within `limit` characters, at least one.

    Of a line of JSON, as our own programs log, it is the message that counts.
    """
    kept: list[str] = []
    said = (part for line in text.splitlines() for part in _message(line).splitlines())
    for line in reversed([one_line(line) for line in said]):
        if not line:
            continue
        if kept and len(" | ".join([line, *kept])) > limit:
            break
        kept.insert(0, line)
    return bounded(" | ".join(kept), limit)


def _message(line: str) -> str:
    """The message of a line of JSON, also of one that lost its beginning (Kubernetes keeps the last
    2048 bytes of a log); any other line as it is."""
    try:
        entry = json.loads(line)
        return str(entry["message"])
    except (ValueError, KeyError, TypeError):
        if not line.endswith('"}') or "\\n" not in line:
            return line
    return line.removesuffix('"}').partition("\\n")[2].replace("\\n", "\n").replace('\\"', '"')


def reason_or(text: str, otherwise: str) -> str:
    """`text` if a condition's reason may be it, else `otherwise`."""
    return text if len(text) <= 64 and _REASON.fullmatch(text) else otherwise


def sentences(parts: Iterable[str]) -> str:
    """Each different part once, in order, as one text."""
    return "; ".join(dict.fromkeys(parts))
