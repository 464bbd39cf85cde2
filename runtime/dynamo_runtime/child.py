"""Child processes that never outlive their parent.

The launcher supervises an engine, the frontend supervises Envoy, the local runner supervises
whole pods. Each child leads its own process group, so that a stop reaches its descendants too,
and asks the kernel for SIGKILL should its parent die (``PR_SET_PDEATHSIG``), so that not even a
SIGKILL of the parent leaves an orphan behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1

# Loaded before any fork: dlopen between fork and exec can deadlock in a threaded process.
_libc = ctypes.CDLL(None, use_errno=True)

_running: dict[int, Child] = {}  # pid -> child; only children that have not been reaped


def _before_exec() -> None:
    # PDEATHSIG fires when the *thread* that forked ends; start children from the main thread.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def signal_group(pgid: int, number: int) -> None:
    """Signal a process group; a group that is gone is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)


def kill_all_children() -> None:
    """SIGKILL the process group of every running child. For the way out, when waiting is over."""
    for pid in list(_running):
        signal_group(pid, signal.SIGKILL)


class Child:
    """One child process, leader of its own group."""

    def __init__(self, process: asyncio.subprocess.Process, argv: Sequence[str]) -> None:
        self._process = process
        self.argv = tuple(argv)
        self.pid = process.pid
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Child:
        """Start ``argv``.

        ``env`` replaces the environment (``None`` inherits it). With ``on_line`` stdout and stderr
        are merged and given to it line by line, without the line end; otherwise they go to
        ``stdout`` and ``stderr``. Raises ``FileNotFoundError`` or ``PermissionError`` for a program
        that can't be run.
        """
        if on_line is not None:
            stdout, stderr = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_before_exec,
        )
        child = cls(process, argv)
        _running[child.pid] = child
        if on_line is not None:
            assert process.stdout is not None
            child._reader = asyncio.create_task(child._read_lines(process.stdout, on_line))
        return child

    @staticmethod
    async def _read_lines(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
        pending = b""
        while chunk := await stream.read(65536):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                on_line(line.decode(errors="replace").rstrip("\r"))
        if pending:
            on_line(pending.decode(errors="replace"))

    @property
    def returncode(self) -> int | None:
        """Exit status as ``subprocess`` gives it (negative: killed by that signal), or ``None``."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for the end and for the last line of output; return the exit status."""
        status = await self._process.wait()
        _running.pop(self.pid, None)
        if self._reader is not None:
            # A grandchild may hold the pipe open: it must not hold us.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._reader), 1.0)
        return status

    def send_signal(self, number: int) -> None:
        """Signal the process itself, not its group. A process that is gone is no error."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, grace_s: float) -> int:
        """SIGTERM to the process; SIGKILL to the group ``grace_s`` seconds later.

        What the process leaves behind in its group is killed as well. Returns the exit status.
        """
        self.send_signal(signal.SIGTERM)
        try:
            status = await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            log.warning("%s did not stop within %g s: killing it", self.argv[0], grace_s)
            signal_group(self.pid, signal.SIGKILL)
            status = await self.wait()
        signal_group(self.pid, signal.SIGKILL)
        if self._reader is not None:
            await self._reader
        return status
