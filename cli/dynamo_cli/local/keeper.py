"""Cleans up after a runner that died without doing so (SIGKILL, or a second Ctrl-C).

Started as a process of its own beside each run, with nothing but the standard library, and reads
its standard input: ``remove PATH`` lines say what to delete should the runner die (``remove-empty``
for a folder that goes only if nothing is in it), ``group PGID`` and ``ended PGID`` tell of the
process groups of containers, ``done`` says that nothing is left to do. End of input without
``done`` means the runner is gone: those groups and whatever carries the run's marker in its
environment are killed, then the paths are removed.

Direct children of a runner die with it by themselves (``runtime.child``); this is for what those
have started: an engine's own worker processes know nothing of us. Marker and group each find what
the other does not: a process may leave its group, and one that sets its title (vLLM's core does)
writes over its environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARKER = "DYNAMO_UP_CONTAINER"  # = <run>/<pod>/<container>/<attempt>
PATIENCE_S = 10.0


def marked(prefix: str) -> list[int]:
    """Processes, ourselves excepted, whose marker begins with ``prefix``."""
    wanted = f"\0{MARKER}={prefix}".encode()
    found: list[int] = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if wanted in b"\0" + (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:
                continue  # gone, or another user's
    return found


def sweep(prefix: str, patience_s: float = PATIENCE_S) -> bool:
    """SIGKILL every process marked with ``prefix`` until there is none; false if one remains."""
    deadline = time.monotonic() + patience_s
    while pids := marked(prefix):
        if time.monotonic() > deadline:
            return False
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.01)  # a killed process stays visible until the kernel has taken it apart
    return True


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        return  # all gone


def _remove(path: Path, *, only_empty: bool) -> None:
    try:
        if only_empty:
            path.rmdir()
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        return  # not there, or somebody else's record is


def _main(run: str) -> None:
    # Ctrl-C is for the runner; the keeper goes when the runner has gone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    steps: list[tuple[str, Path]] = []
    groups: set[int] = set()
    for line in sys.stdin:
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "done":
            return
        if word == "group":
            groups.add(int(rest))
        elif word == "ended":
            groups.discard(int(rest))
        else:
            steps.append((word, Path(rest)))
    for group in groups:
        _kill_group(group)
    sweep(f"{run}/")
    for word, target in steps:
        _remove(target, only_empty=word == "remove-empty")


if __name__ == "__main__":
    _main(sys.argv[1])
