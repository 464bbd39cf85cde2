"""What cleans up after a launcher that had no chance to do it itself.

The kernel kills the engine's process when the launcher dies (``dynamo_runtime.child``), but not the
helpers that this process had started: vLLM's core would go on, with its memory and its sockets. So
a tiny process of its own session waits at a pipe that only the launcher holds. The pipe closes
when the launcher ends, by whatever signal, and the guard kills the engine's process group and
removes the launcher's folder.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

# All of our environment that it gets. Whoever clears up after this process may find what belongs to
# it by a variable, and would end the guard before it has done its work.
_ENVIRONMENT = ("LD_LIBRARY_PATH",)

# Arguments: process group, folder. A byte means that all is in order; the end of the pipe that
# nothing is.
_PROGRAM = """
import os, shutil, signal, sys
if not os.read(0, 1):
    try:
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
    except ProcessLookupError:
        pass
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""


class Guard:
    """Watches this process for the sake of a process group and a folder."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, group: int, folder: Path) -> Guard:
        """``group`` is killed and ``folder`` removed when this process ends before ``release``."""
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _PROGRAM, str(group), str(folder)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,
            )
        )

    async def release(self) -> None:
        """The group has ended: only the folder is left to remove."""
        await self._process.communicate(b".")
