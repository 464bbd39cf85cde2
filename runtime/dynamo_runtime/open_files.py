"""The limit of open files, for programs that hold a connection for each request.

The soft limit is 1024 as a rule, for the sake of programs that still use ``select``; systemd and
container runtimes leave the hard one far above. Source: ``getrlimit(2)``, ``RLIMIT_NOFILE``.
"""

from __future__ import annotations

import resource


def raise_limit() -> int:
    """As many open files as this process, and what it starts, may have. Returns the limit, -1 if
    there is none."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
