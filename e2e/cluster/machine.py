"""What a node changes on the machine, made and undone: a network namespace, a pair of interfaces,
two routes, three kernel settings that the kubelet sets, a parent control group.

Undoing needs no memory of the run: all of it is found by its own names, whatever state the making
was left in. The firewall rules, mounts and processes are inside the node's namespaces and go with
them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from e2e.cluster.settings import (
    CGROUP,
    HOST_IP,
    NETNS,
    NODE_IP,
    POD_NETWORK,
    PREFIX,
    SERVICE_NETWORK,
)

SYSCTLS = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")
PROC_SYS = Path("/proc/sys")
CGROUPS = Path("/sys/fs/cgroup")


class MachineError(Exception):
    """The machine refuses something; says what."""


def ip(*arguments: str) -> str:
    """The `ip` command's output. Raises `MachineError`."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def save_sysctls(path: Path) -> None:
    """Write down what the kubelet is going to change."""
    values = {name: (PROC_SYS / name).read_text().strip() for name in SYSCTLS}
    path.write_text(json.dumps(values))


def restore_sysctls(path: Path) -> None:
    """Put back what was written down, if anything was."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        for name, value in json.loads(path.read_text()).items():
            if (PROC_SYS / name).read_text().strip() != value:
                (PROC_SYS / name).write_text(value)


def make_network() -> None:
    """The node's namespace, reachable from the machine and reaching it, and nothing beyond."""
    in_node = ("-n", NETNS)
    ip("netns", "add", NETNS)
    ip("link", "add", NETNS, "type", "veth", "peer", "name", "eth0", "netns", NETNS)
    ip("addr", "add", f"{HOST_IP}/{PREFIX}", "dev", NETNS)
    ip("link", "set", NETNS, "up")
    ip(*in_node, "addr", "add", f"{NODE_IP}/{PREFIX}", "dev", "eth0")
    ip(*in_node, "link", "set", "eth0", "up")
    ip(*in_node, "link", "set", "lo", "up")
    ip(*in_node, "route", "add", "default", "via", HOST_IP)
    for network in (POD_NETWORK, SERVICE_NETWORK):
        ip("route", "add", network, "via", NODE_IP)


def remove_network() -> None:
    """End what still runs in the namespace; remove it, the interfaces and so the routes."""
    with contextlib.suppress(MachineError):
        end([int(pid) for pid in ip("netns", "pids", NETNS).split()])
    with contextlib.suppress(MachineError):
        ip("link", "del", NETNS)
    with contextlib.suppress(MachineError):
        ip("netns", "del", NETNS)
    folder = Path("/run/netns")  # `ip` mounts it on itself with the first namespace
    if folder.is_mount() and not any(folder.iterdir()):
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _cgroup_parents() -> list[Path]:
    """The root of each hierarchy: one folder a controller in version 1, one in all in version 2."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    found: dict[Path, None] = {}
    for path in sorted(CGROUPS.iterdir()):  # cpu and cpuacct may be links to one folder
        if (path / "cgroup.procs").exists():
            found[path.resolve()] = None
    return list(found)


def make_cgroups() -> None:
    """A parent for the pods' control groups, so that they can't be taken for another node's."""
    for parent in _cgroup_parents():
        group = parent / CGROUP
        with contextlib.suppress(FileExistsError, PermissionError):
            group.mkdir()
        if parent.name == "cpuset":  # version 1: empty until told
            for name in ("cpuset.cpus", "cpuset.mems"):
                (group / name).write_text((parent / name).read_text())


def remove_cgroups() -> None:
    """Remove them; those that died a moment ago take a moment to leave."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        left = False
        for parent in _cgroup_parents():
            for folder, _, _ in os.walk(parent / CGROUP, topdown=False):
                try:
                    Path(folder).rmdir()
                except OSError:
                    left = True
        if not left:
            return
        time.sleep(0.1)


def started_at(pid: int) -> str:
    """When a process started, in the kernel's ticks: with the id it names one process for good."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_running(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def end(pids: list[int]) -> None:
    """Kill these processes and wait until they are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20.0
    while any(is_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise MachineError(f"still there after SIGKILL: {[p for p in pids if is_running(p)]}")
        time.sleep(0.02)
