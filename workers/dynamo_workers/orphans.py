"""The duties of process 1 in a container: adopt what its descendants leave behind, and bury it.

An engine starts helper processes; when one of their parents dies, they become children of the
launcher. Nobody else waits for them, so without this they stay as zombies until the pod ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def adopt() -> None:
    """Become the parent of orphaned descendants, also where this is not process 1."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap(own: Collection[int]) -> list[int]:
    """Wait for every child that has ended, except ``own``, whose owners wait for them.

    Returns the pids reaped. Never blocks.
    """
    reaped = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            children = (task / "children").read_text().split()
            for pid in map(int, children):
                if pid in own:
                    continue
                with contextlib.suppress(ChildProcessError):
                    if os.waitpid(pid, os.WNOHANG)[0]:
                        reaped.append(pid)
    return reaped
