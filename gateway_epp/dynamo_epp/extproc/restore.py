"""Puts the model's name that the client asked for back into a relayed answer.

Where a rewrite sent a request to another model, the engine answers under that model's name. Answers
are JSON, or server-sent events of JSON, and come in chunks cut anywhere; nothing is parsed. What is
looked for is the key ``"model"`` with exactly the engine's name: inside of a JSON string its quotes
would be escaped, so generated text can't be mistaken for it.

Limits: compressed answers and other content types pass as they are; so does a name behind more than
``SPACE`` characters of white space, and one whose spelling in JSON is none of Python's two.
"""

from __future__ import annotations

import json
import re

_KEY = b'"model"'
SPACE = 8
"""White space looked through on either side of the colon; it bounds what is held back."""

_CONTENT_TYPES = ("application/json", "text/event-stream")


def can_restore(content_type: str, content_encoding: str) -> bool:
    """Whether an answer with these headers can be looked into."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind in _CONTENT_TYPES and content_encoding.strip().lower() in ("", "identity")


def _spellings(name: str) -> tuple[bytes, ...]:
    """``name`` as JSON writes it, with and without escapes for what is not ASCII."""
    plain = json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return tuple(dict.fromkeys((json.dumps(name).encode(), plain)))


class ModelRestorer:
    """Replaces ``engine``'s name with ``asked`` in one answer; see the module.

    Bytes come out in the order in which they came in, none is lost or added besides the name, and
    at most a name's length and a few more are held back between chunks.
    """

    __slots__ = ("_asked", "_before", "_held", "_pattern", "_spellings")

    def __init__(self, engine: str, asked: str) -> None:
        self._spellings = _spellings(engine)
        self._asked = json.dumps(asked).encode()
        names = b"|".join(map(re.escape, self._spellings))
        space = rb"[ \t\r\n]{0,%d}" % SPACE
        self._pattern = re.compile(
            rb"(?<!\\)(%b%b:%b)(?:%b)" % (re.escape(_KEY), space, space, names)
        )
        self._held = b""  # may become a match with what comes next
        self._before = b""  # the last byte that went out, if it escapes what comes next

    def feed(self, chunk: bytes, end: bool) -> bytes:
        """What can go out now that ``chunk`` has come; all of it if it was the ``end``."""
        data = self._before + self._held + chunk
        data = self._pattern.sub(lambda found: found[1] + self._asked, data)
        start = len(self._before)
        cut = len(data) if end else self._first_open(data, start)
        out, self._held = data[start:cut], data[cut:]
        self._before = b"\\" if cut and data[cut - 1 : cut] == b"\\" else b""
        return out

    def flush(self) -> bytes:
        """What is held back; nothing may follow."""
        return self.feed(b"", True)

    def _first_open(self, data: bytes, start: int) -> int:
        """Where the first match begins that is not complete yet; the end if there is none."""
        longest = len(_KEY) + 2 * SPACE + 1 + max(map(len, self._spellings))
        at = data.find(b'"', max(start, len(data) - longest))
        while at >= 0:
            if data[at - 1 : at] != b"\\" and self._may_match(data[at:]):
                return at
            at = data.find(b'"', at + 1)
        return len(data)

    def _may_match(self, tail: bytes) -> bool:
        """Whether ``tail`` is the beginning of a match, and not yet one."""
        if len(tail) <= len(_KEY):
            return _KEY.startswith(tail)
        if not tail.startswith(_KEY):
            return False
        rest = _without_space(tail[len(_KEY) :])
        if not rest:
            return True
        if rest[:1] != b":":
            return False
        rest = _without_space(rest[1:])
        return any(name.startswith(rest) and rest != name for name in self._spellings)


def _without_space(data: bytes) -> bytes:
    """``data`` without white space before it, of which no more is taken away than a match has."""
    size = 0
    while size < SPACE and data[size : size + 1] in (b" ", b"\t", b"\r", b"\n"):
        size += 1
    return data[size:]
