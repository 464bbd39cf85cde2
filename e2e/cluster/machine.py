"""What a node changes on the machine, made and undone: a network namespace, a pair of interfaces,
two routes, three kernel settings that the kubelet sets, a parent control group.

Undoing needs no memory of the run: all of it is found by the cluster's own names, whatever state
the making was left in. The firewall rules, mounts and processes are inside the node's namespaces
and go with them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from e2e.cluster.settings import Network

SYSCTLS = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")
PROC_SYS = Path("/proc/sys")
CGROUPS = Path("/sys/fs/cgroup")
NAMESPACES = Path("/run/netns")
SAVED = Path("/run/dynamo-e2e-sysctls.json")
PREFIX = 30
CPU_WEIGHTS = {"cpu.shares": "10240", "cpu.weight": "1000"}
"""Of all pods together, in control groups of version 1 and 2: ten times the usual, as they are many
processes. Else they would get what one busy process of the machine gets."""


class MachineError(Exception):
    """The machine refuses something; says what."""


def ip(*arguments: str) -> str:
    """The `ip` command's output. Raises `MachineError`."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def save_sysctls() -> None:
    """Write down what the kubelet is going to change, unless another cluster's has already."""
    if not SAVED.exists():
        values = {name: (PROC_SYS / name).read_text().strip() for name in SYSCTLS}
        SAVED.write_text(json.dumps(values))


def restore_sysctls() -> None:
    """Put back what was written down, once the last cluster is gone."""
    if not SAVED.exists() or namespaces():
        return
    for name, value in json.loads(SAVED.read_text()).items():
        if (PROC_SYS / name).read_text().strip() != value:
            (PROC_SYS / name).write_text(value)
    SAVED.unlink()


def namespaces() -> list[str]:
    """Names of the clusters' network namespaces on this machine."""
    names = [path.name for path in NAMESPACES.glob("*")]
    return [name for name in names if name.startswith("dynamo-e2e")]


def owner(network: Network) -> str:
    """The `state` folder of whichever cluster runs in this namespace; "" if none does."""
    return next(filter(None, map(_supervised, processes(network))), "")


def supervisors(state: str) -> list[int]:
    """The supervisor of the cluster whose `state` folder this is, with what started it in a node's
    namespaces; none if it does not run."""
    found = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in found if _supervised(pid) == state]


def _supervised(pid: int) -> str:
    """The `state` folder that a supervisor's command line names; "" for another process."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:  # gone, or hidden from us
        return ""
    for word, following in itertools.pairwise(words):
        if word.endswith("/supervisor.py"):
            return following
    return ""


def processes(network: Network) -> list[int]:
    """Those that run in the node's network namespace."""
    if network.name not in namespaces():
        return []
    return [int(pid) for pid in ip("netns", "pids", network.name).split()]


def make_network(network: Network) -> None:
    """The node's namespace, reachable from the machine and reaching it, and nothing beyond."""
    name = network.name
    inside = ("-n", name)
    ip("netns", "add", name)
    ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("addr", "add", f"{network.host_ip}/{PREFIX}", "dev", name)
    ip("link", "set", name, "up")
    ip(*inside, "addr", "add", f"{network.node_ip}/{PREFIX}", "dev", "eth0")
    ip(*inside, "link", "set", "eth0", "up")
    ip(*inside, "link", "set", "lo", "up")
    ip(*inside, "route", "add", "default", "via", network.host_ip)
    for addresses in (network.pods, network.services):
        ip("route", "add", addresses, "via", network.node_ip)


def remove_network(network: Network) -> None:
    """End what still runs in the namespace; remove it, the interfaces and so the routes."""
    end(processes(network))
    with contextlib.suppress(MachineError):
        ip("link", "del", network.name)
    with contextlib.suppress(MachineError):
        ip("netns", "del", network.name)
    if NAMESPACES.is_mount() and not any(NAMESPACES.iterdir()):
        # `ip` mounts the folder on itself with the first namespace.
        subprocess.run(["umount", str(NAMESPACES)], capture_output=True, check=False)
        with contextlib.suppress(OSError):
            NAMESPACES.rmdir()


def cgroup_parents() -> list[Path]:
    """The root of each hierarchy: one folder a controller in version 1, one in all in version 2."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    found: dict[Path, None] = {}
    for path in sorted(CGROUPS.iterdir()):  # cpu and cpuacct may be links to one folder
        if (path / "cgroup.procs").exists():
            found[path.resolve()] = None
    return list(found)


def make_cgroups(network: Network) -> None:
    """A parent for the pods' control groups, so that they can't be taken for another node's."""
    for parent in cgroup_parents():
        group = parent / network.name
        with contextlib.suppress(FileExistsError, PermissionError):
            group.mkdir()
        if parent.name == "cpuset":  # version 1: empty until told
            for name in ("cpuset.cpus", "cpuset.mems"):
                (group / name).write_text((parent / name).read_text())
        for name, value in CPU_WEIGHTS.items():
            if (group / name).exists():
                (group / name).write_text(value)


def remove_cgroups(network: Network) -> None:
    """Remove them; those that died a moment ago take a moment to leave."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        left = False
        for parent in cgroup_parents():
            for folder, _, _ in os.walk(parent / network.name, topdown=False):
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


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += [int(child) for child in children.read_text().split()]
    return found


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
