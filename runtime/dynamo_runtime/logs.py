"""Logging: lines for a person on a terminal, JSON for a collector otherwise.

The request id travels in a context variable, so that every line written while a request is handled
carries it without being passed along. A line about one thing may bring figures of its own
(``extra={"fields": {…}}``), which stay apart from the words.
"""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

import msgspec

request_id: ContextVar[str] = ContextVar("request_id", default="")

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts (RFC 3339, UTC, ms), level, component, logger, message, …"""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "ts": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "component": self._component,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if rid := request_id.get():
            line["request_id"] = rid
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class HumanFormatter(logging.Formatter):
    """``12:34:56 WARNING component: message [request id]``"""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{moment} {record.levelname:<7} {self._component}: {record.getMessage()}"
        fields: dict[str, Any] = getattr(record, "fields", {})
        for name, value in fields.items():
            line += f" {name}={msgspec.json.encode(value).decode()}"
        if (rid := request_id.get()) and "request_id" not in fields:
            line += f" [{rid}]"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(component: str, level: str = "INFO") -> None:
    """Log to stderr as ``component``; ``level`` is one of ``LEVELS`` (any case)."""
    name = level.upper()
    if name not in LEVELS:
        raise ValueError(f"log level {level!r} is unknown; use one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    human = sys.stderr.isatty()
    handler.setFormatter(HumanFormatter(component) if human else JsonFormatter(component))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(name)
