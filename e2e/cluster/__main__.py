"""`python -m e2e.cluster build|up|down|status|env|load|kwok|addon|logs|kubectl`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType

from e2e.cluster import build, machine, toolchain
from e2e.cluster.cluster import ADDONS, Cluster, ClusterError, WaitTimeout
from e2e.cluster.on_demand import ON_DEMAND
from e2e.cluster.progress import say

EXPECTED = (
    ClusterError,
    WaitTimeout,
    build.BuildError,
    toolchain.MissingPrograms,
    machine.MachineError,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="python -m e2e.cluster",
        description="A real Kubernetes on this machine (KUBECONFIG set: that cluster instead).",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    making = commands.add_parser("build", help="build what is missing, without starting anything")
    making.add_argument(
        "further",
        nargs="*",
        metavar="NAME",
        help=f"what is built only when it is asked for: {', '.join(ON_DEMAND)}",
    )
    commands.add_parser("up", help="start it unless it runs")
    commands.add_parser("down", help="stop it and remove what it left")
    commands.add_parser("status", help="say what runs")
    commands.add_parser("env", help='for a shell: eval "$(python -m e2e.cluster env)"')
    load = commands.add_parser("load", help="bring an image onto the node")
    load.add_argument("image", help="a docker-archive file, or an image of `make images` by name")
    kwok = commands.add_parser("kwok", help="add fake nodes")
    kwok.add_argument("count", type=int, help="how many; 0 removes them")
    addon = commands.add_parser("addon", help="install an add-on")
    addon.add_argument("name", choices=sorted(ADDONS))
    logs = commands.add_parser("logs", help="collect logs, objects and events")
    logs.add_argument("folder", type=Path)
    kubectl = commands.add_parser("kubectl", help="run kubectl against it", add_help=False)
    kubectl.add_argument("arguments", nargs=argparse.REMAINDER)
    return root


def run(options: argparse.Namespace, cluster: Cluster) -> int:
    """Do what the command line says; the exit status."""
    match options.command:
        case "build":
            if unknown := set(options.further) - set(ON_DEMAND):
                names = ", ".join(sorted(unknown))
                raise ClusterError(f"build {names}: there are {', '.join(ON_DEMAND)}")
            further = [ON_DEMAND[name] for name in options.further]
            if not build.build(cluster.layout, os.geteuid() == 0, further):
                say("everything is built")
        case "up":
            cluster.up()
            print(f"export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}")
        case "down":
            cluster.down()
        case "status":
            return status(cluster)
        case "env":
            print(f"export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}")
            print(f"export PATH={shlex.quote(str(cluster.layout.bin))}:$PATH")
        case "load":
            archive = Path(options.image)
            if not archive.exists():
                archive = cluster.layout.images / f"{options.image}.tar"
            if not archive.exists():
                known = sorted(path.stem for path in cluster.layout.images.glob("*.tar"))
                raise ClusterError(f"{options.image}: no such file, and no image of {known}")
            cluster.load_image(archive)
        case "kwok":
            if options.count:
                cluster.add_kwok_nodes(options.count)
            else:
                cluster.remove_kwok_nodes()
        case "addon":
            cluster.install_addon(options.name)
        case "logs":
            cluster.collect_logs(options.folder)
        case "kubectl":
            command = [*cluster.kubectl_command(), *options.arguments]
            os.execve(command[0], command, {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)})
    return 0


def status(cluster: Cluster) -> int:
    """Print what runs; 0 if the cluster is up."""
    if cluster.is_foreign:
        print(f"not ours: KUBECONFIG={cluster.kubeconfig}")
        return 0 if cluster.is_ready() else 1
    if not cluster.is_up:
        print("down")
        return 1
    print(f"up, {'with a node' if cluster.has_pods else 'control plane only'}")
    print(f"KUBECONFIG={cluster.kubeconfig}")
    for name, facts in cluster.components().items():
        print(f"{name:20} {'running' if facts['running'] else '-':8} started {facts['starts']}×")
    return 0


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = parser().parse_args()
    # So that a start that is ended cleans up. A shell's background jobs are born deaf to SIGINT.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminated)
    try:
        return run(options, Cluster())
    except EXPECTED as error:
        sys.stderr.write(f"e2e.cluster: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("e2e.cluster: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
