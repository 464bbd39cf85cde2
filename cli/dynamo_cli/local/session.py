"""What one run owns on the machine, and how it all goes away again.

Processes (by a marker in their environment), a scratch folder, addresses, a record for other
commands: owned from here, released here in one place, and registered with a keeper process the
moment they exist, so that they also go when the runner is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from dynamo_cli.local import keeper
from dynamo_cli.local.addresses import Addresses
from dynamo_cli.local.record import make_runtime_folder
from dynamo_cli.local.volumes import remove_tree


class CannotKeepState(Exception):
    """The state folder can't be used; the message names it and the reason."""


class Session:
    """One run: open it, register what is made, close it.

    ``state`` holds logs and the endpoints file and is what a user may look at; ``scratch`` holds
    the pods' volumes and temporary files. The scratch path is short, because a Unix socket's path
    has room for 107 bytes and engines make such sockets in there.
    """

    def __init__(self, state_dir: Path | None) -> None:
        self.id = secrets.token_hex(6)
        self.addresses = Addresses()
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(keeper.__file__)), self.id],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # The keeper holds the addresses too: they are free only when their processes are gone.
            pass_fds=[block.lock.fileno() for block in self.addresses.blocks],
            start_new_session=True,
            cwd="/",
        )
        try:
            self.temporary_state = state_dir is None
            self.state = self._folder("dynamo-up-") if state_dir is None else _usable(state_dir)
            self.scratch = self._folder("dyn-")
            self.record = make_runtime_folder() / f"up-{os.getpid()}.json"
            self.tell(f"remove {self.record}")
            self.tell(f"remove-empty {self.record.parent}")
        except BaseException:
            self._dismiss()
            raise

    def _folder(self, prefix: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        self.tell(f"remove {folder}")
        return folder

    def tell(self, line: str) -> None:
        """One line for the keeper; see there."""
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.write(line.encode() + b"\n")
            self._keeper.stdin.flush()

    def _dismiss(self) -> None:
        self.tell("done")
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        self._keeper.wait()
        self.addresses.release()

    async def close(self, *, keep_state: bool) -> None:
        """Kill what still runs and remove everything; ``keep_state`` leaves a temporary state."""
        await asyncio.to_thread(keeper.sweep, f"{self.id}/")
        await asyncio.to_thread(remove_tree, self.scratch)
        if self.temporary_state and not keep_state:
            await asyncio.to_thread(remove_tree, self.state)
        self.record.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another run's record is in there
            self.record.parent.rmdir()
        await asyncio.to_thread(self._dismiss)


def _usable(folder: Path) -> Path:
    """``folder``, made if missing and proven writable. Raises ``CannotKeepState``."""
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise CannotKeepState(f"--state-dir {folder}: {error.strerror}") from error
