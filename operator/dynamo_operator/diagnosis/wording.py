"""How texts become one short line that `kubectl get` can show."""

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
    """The end of a container's log: whole last lines within `limit` characters, at least one."""
    kept: list[str] = []
    for line in reversed([one_line(line) for line in text.splitlines()]):
        if not line:
            continue
        if kept and len(" | ".join([line, *kept])) > limit:
            break
        kept.insert(0, line)
    return bounded(" | ".join(kept), limit)


def reason_or(text: str, otherwise: str) -> str:
    """`text` if a condition's reason may be it, else `otherwise`."""
    return text if len(text) <= 64 and _REASON.fullmatch(text) else otherwise


def sentences(parts: Iterable[str]) -> str:
    """Each different part once, in order, as one text."""
    return "; ".join(dict.fromkeys(parts))
