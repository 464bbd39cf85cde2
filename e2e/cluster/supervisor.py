"""Keeps the cluster's processes running; the PID 1 of the node where there is one.

It starts each component when what it needs is there, starts again what ends, reaps what orphans
leave, and takes commands on a socket: tests stop one component and bring it back. When it ends, all
of them end: by the kernel with the node's PID namespace, or by the signal each asked for.

Standard library only: `python supervisor.py STATE`, where `STATE/components.json` says what to run.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AGAIN_S = 1.0
"""Pause before a component that ended starts again, in seconds."""
TICK_S = 0.1
PR_SET_CHILD_SUBREAPER = 36


@dataclass(slots=True)
class Child:
    """One component at run time."""

    name: str
    argv: list[str]
    after: str
    wanted: bool
    pid: int = 0
    """0 while it does not run."""
    not_before: float = 0.0
    starts: int = field(default=0)


class Supervisor:
    """The components of `components.json` in the folder `state`."""

    def __init__(self, state: Path) -> None:
        settings = json.loads((state / "components.json").read_text())
        self.state = state
        self.etcd: str = settings["etcd"]
        self.trust = ssl.create_default_context(cafile=settings["ca"])
        self.env = {**os.environ, "PATH": settings["path"]}
        self.children = {item["name"]: Child(**item) for item in settings["components"]}
        self.die_with_parent: bool = not settings["node"]

    def run(self) -> None:
        """Until killed."""
        reading, writing = socket.socketpair()
        for end in (reading, writing):
            end.setblocking(False)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        server = socket.socket(socket.AF_UNIX)
        hidden = self.state / "node.sock.part"  # seen only once it answers
        server.bind(str(hidden))
        server.listen()
        hidden.rename(self.state / "node.sock")
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            selector.register(server, selectors.EVENT_READ)
            while True:
                self.start_what_is_due()
                ready = [key.fileobj for key, _ in selector.select(TICK_S)]
                if reading in ready:
                    reading.recv(4096)
                self.reap()
                if server in ready:
                    self.serve(server)

    def start_what_is_due(self) -> None:
        for child in self.children.values():
            due = child.wanted and not child.pid and time.monotonic() >= child.not_before
            if due and self.is_there(child.after):
                self.start(child)

    def is_there(self, what: str) -> bool:
        if what.startswith("https:"):
            try:
                with urllib.request.urlopen(what, timeout=1.0, context=self.trust) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False
        return not what or Path(what).exists()

    def start(self, child: Child) -> None:
        log = str(self.state / "log" / f"{child.name}.log")
        argv = child.argv
        if self.die_with_parent:
            argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        child.pid = os.posix_spawnp(
            argv[0],
            argv,
            self.env,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, flags, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        child.starts += 1
        print(f"{child.name}: started, process {child.pid}", flush=True)

    def reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self.ended(*ended)

    def ended(self, pid: int, status: int) -> None:
        for child in self.children.values():
            if child.pid == pid:
                child.pid = 0
                child.not_before = time.monotonic() + AGAIN_S
                print(f"{child.name}: ended, {os.waitstatus_to_exitcode(status)}", flush=True)

    # --- commands, one line a connection, answered by one line of JSON

    def serve(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5.0)
            words = connection.makefile().readline().split()
            try:
                answer = self.command(*words)
            except (TypeError, KeyError, OSError) as error:
                answer = {"error": f"{' '.join(words)}: {error!r}"}
            connection.sendall(json.dumps(answer).encode() + b"\n")

    def command(self, verb: str, name: str = "") -> dict[str, Any]:
        if verb == "status":
            return {
                child.name: {"running": bool(child.pid), "starts": child.starts}
                for child in self.children.values()
            }
        if verb == "start":
            self.children[name].wanted = True
            self.children[name].not_before = 0.0
            return {}
        if verb in ("stop", "kill"):
            # At once and without a farewell, as a machine loses power: streams break.
            child = self.children[name]
            child.wanted = verb == "kill"
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                self.ended(*os.waitpid(child.pid, 0))
            return {}
        if verb == "compact":
            return {"revision": self.compact()}
        raise KeyError(verb)

    def compact(self) -> int:
        """Throw away etcd's history up to now: watches that are behind get 410."""
        key = base64.b64encode(b"/").decode()
        revision = int(self.ask_etcd("range", {"key": key})["header"]["revision"])
        self.ask_etcd("compaction", {"revision": revision, "physical": True})
        return revision

    def ask_etcd(self, what: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.etcd}/v3/kv/{what}", json.dumps(body).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=4.0) as answer:
            return dict(json.load(answer))


def enter_node(state: Path, hostname: str) -> None:
    """Mounts of the node's own: its disk is memory (a slow disk costs minutes)."""
    for command in (
        ["mount", "--make-rshared", "/"],
        ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/var/lib"],
        ["mount", "--bind", str(state / "log"), "/var/log"],
        ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"],
        ["hostname", hostname],
    ):
        subprocess.run(command, check=True)


def main() -> None:
    state = Path(sys.argv[1])
    if len(sys.argv) > 2:
        enter_node(state, sys.argv[2])
    else:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Supervisor(state).run()


if __name__ == "__main__":
    main()
