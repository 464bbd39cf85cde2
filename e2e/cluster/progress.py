"""Lines that say what happens and after how many seconds; waiting with a limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

START = time.monotonic()


class WaitTimeout(Exception):
    """Something did not come true in time; says what and what is known of it."""


def say(text: str) -> None:
    """One line on standard error, with the seconds since this process began."""
    sys.stderr.write(f"{time.monotonic() - START:7.1f}s {text}\n")
    sys.stderr.flush()


def wait_for(
    what: str,
    predicate: Callable[[], object],
    timeout: float,
    interval: float = 0.2,
    explain: Callable[[], str] = lambda: "",
) -> None:
    """Until `predicate()` is true, asked every `interval` s.

    Raises `WaitTimeout` after `timeout` s, with what `explain()` says then.
    """
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            detail = explain()
            raise WaitTimeout(
                f"{what}: not within {timeout:g} s" + (f"; {detail}" if detail else "")
            )
        time.sleep(interval)
