"""A Kubernetes cluster for tests: up, down, and what tests do with it.

Three shapes behind one class. As root, a node of its own in namespaces of its own, where pods run.
Without root, a control plane of plain processes on loopback: objects, no pods (`has_pods`). With
`KUBECONFIG` set, the cluster it names: nothing is started, stopped or loaded there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import string
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from e2e.cluster import (
    addons,
    build,
    certificates,
    components,
    machine,
    on_demand,
    progress,
    settings,
    toolchain,
)
from e2e.cluster.addons import ADDONS
from e2e.cluster.components import Addresses
from e2e.cluster.progress import WaitTimeout, say
from e2e.cluster.settings import Layout

HERE = Path(__file__).parent
START_S = 180.0
IMPORTS_AT_ONCE = 4
MAX_STARTS = 8
MAX_SOCKET_PATH = 107

Manifests = str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]]


class ClusterError(Exception):
    """The cluster can't do what was asked; says why, and where its logs are."""


class KubectlError(ClusterError):
    """kubectl failed; the message is what it said."""


class Cluster:
    """One cluster. Making the object does nothing; `up` starts it unless it runs."""

    def __init__(
        self,
        layout: Layout | None = None,
        env: Mapping[str, str] = os.environ,
        *,
        with_node: bool | None = None,
        apiserver_flags: Sequence[str] = (),
    ) -> None:
        """`with_node` False: a control plane only, also as root; None: what the user allows.

        Several clusters need folders of their own (`Layout.run`), and only one can have a node.
        """
        self.layout = layout or settings.layout(env)
        self._with_node = os.geteuid() == 0 if with_node is None else with_node
        self._apiserver_flags = tuple(apiserver_flags)
        given = env.get("KUBECONFIG", "")
        self.is_foreign = bool(given) and given != str(self.layout.kubeconfig)
        """Whether it is somebody's cluster that `KUBECONFIG` names."""
        self.kubeconfig = Path(given) if self.is_foreign else self.layout.kubeconfig
        self._asking: set[subprocess.Popen[str]] = set()  # containerd, at the moment
        self._given_up = False  # the start that they are part of

    # --- what it is

    @property
    def has_pods(self) -> bool:
        """Whether pods run: on somebody's cluster, and on a node of our own."""
        record = self._record()
        return self.is_foreign or (record["node"] if record else self._with_node)

    @property
    def why_no_pods(self) -> str:
        """The reason to skip a test that needs pods; "" if they run."""
        return (
            "" if self.has_pods else "pods need a node, and a node needs root: control plane only"
        )

    @property
    def is_up(self) -> bool:
        """Whether it runs and was started to the end."""
        return self.is_foreign or (self._is_running() and (self.layout.state / "ready").exists())

    @property
    def node_ip(self) -> str:
        """Address of the node, at which the machine reaches its host ports."""
        return self.layout.network.node_ip if self.has_pods else "127.0.0.1"

    @property
    def host_ip(self) -> str:
        """Address of the machine, at which pods and the API server reach its servers (webhooks)."""
        return self.layout.network.host_ip if self.has_pods else "127.0.0.1"

    @property
    def logs(self) -> Path:
        """Folder with one log a component, and the pods' below `pods`."""
        return self.layout.logs

    # --- up and down

    def up(self) -> None:
        """Start it unless it runs; returns when it is usable. Builds what is missing first.

        A start that fails or is interrupted leaves nothing but its logs, in `last-failure`.
        """
        if self.is_foreign:
            self.kubectl("version")
            return
        with self._lock():
            if self.is_up:
                return
            self._refuse_if_taken()
            build.build(self.layout, self._with_node)
            self._down()
            try:
                self._start(self._with_node)
                self._make_usable()
            except BaseException:
                with contextlib.suppress(OSError):
                    shutil.rmtree(self.layout.failure, ignore_errors=True)
                    shutil.copytree(self.layout.logs, self.layout.failure, symlinks=True)
                self._down()
                raise

    def down(self) -> None:
        """Stop it and remove what it left; does nothing if there is nothing."""
        if not self.is_foreign:
            with self._lock():
                self._down()

    def _refuse_if_taken(self) -> None:
        """Raise if another folder's cluster has the same number, so the same addresses."""
        other = machine.owner(self.layout.network) if self._with_node else ""
        if other not in ("", str(self.layout.state)):
            number = self.layout.network.number
            raise ClusterError(
                f"cluster {number} of {other} runs on this machine; set DYNAMO_CLUSTER to "
                "another number"
            )

    def _down(self) -> None:
        # Not by the record: a start that was killed may not have come to write it.
        for pid in machine.supervisors(str(self.layout.state)):
            machine.end(machine.family(pid))
        network = self.layout.network
        if self._with_node and machine.owner(network) in ("", str(self.layout.state)):
            machine.remove_network(network)
            machine.restore_sysctls()
            machine.remove_cgroups(network)
        shutil.rmtree(self.layout.state, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One up or down at a time on this machine."""
        self.layout.root.mkdir(parents=True, exist_ok=True)
        with (self.layout.root / f"lock{self.layout.network.suffix}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _record(self) -> dict[str, Any] | None:
        """What was written of the supervisor's process; None if nothing was started."""
        try:
            return dict(json.loads((self.layout.state / "run.json").read_text()))
        except (FileNotFoundError, ValueError):
            return None

    def _is_running(self) -> bool:
        record = self._record()
        if record is None or machine.started_at(record["pid"]) != record["started"]:
            return False
        return machine.is_running(record["pid"])

    def _start(self, with_node: bool) -> None:
        layout = self.layout
        if len(str(layout.containerd_socket)) > MAX_SOCKET_PATH:
            raise ClusterError(f"{layout.root}: too long a path for sockets; set DYNAMO_CACHE")
        layout.logs.mkdir(parents=True)
        certificates.make(layout.pki, layout.network)
        if with_node:
            at = components.node_addresses(layout.network)
        else:
            at = Addresses("127.0.0.1", *_free_ports(3))
        for client in certificates.CLIENTS:
            path = layout.state / f"{client}.kubeconfig"
            certificates.write_kubeconfig(path, layout.pki, client, at.server)
        data = "/var/lib/etcd" if with_node else str(layout.state / "etcd")
        parts = components.control_plane(layout, at, data, with_node, self._apiserver_flags)
        command = [sys.executable, str(HERE / "supervisor.py"), str(layout.state)]
        if with_node:
            parts += components.node(layout, at)
            components.write_node_files(layout)
            machine.save_sysctls()
            machine.make_cgroups(layout.network)
            machine.make_network(layout.network)
            command = [
                *("nsenter", f"--net=/run/netns/{layout.network.name}"),
                *("unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc"),
                *("--mount-proc", *command, settings.NODE),
            ]
        record = {
            "node": with_node,
            "etcd": at.etcd,
            "ca": str(layout.pki / "ca.crt"),
            "path": f"{layout.bin}:{toolchain.system_path()}",
            "components": [part.as_json() for part in parts],
        }
        (layout.state / "components.json").write_text(json.dumps(record, indent=1))
        with (layout.logs / "supervisor.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        run = {
            "pid": process.pid,
            "started": machine.started_at(process.pid),
            "node": with_node,
            "server": at.server,
        }
        (layout.state / "run.json").write_text(json.dumps(run))
        process.returncode = 0  # it outlives this process: nothing to wait for

    def _make_usable(self) -> None:
        layout = self.layout
        shutil.copy(layout.state / "admin.kubeconfig", layout.kubeconfig)
        self._until("supervisor answers", layout.control_socket.exists)
        pool = ThreadPoolExecutor(IMPORTS_AT_ONCE)
        try:
            imports = []
            if self.has_pods:
                self._until("containerd answers", self._containerd_answers)
                archives = sorted(layout.images.glob("*.tar"))
                imports = [pool.submit(self.load_image, archive) for archive in archives]
            self._until("API server ready", self.is_ready)
            if self.has_pods:
                self._furnish_node(imports)
            self._until(
                "default service account",
                lambda: self._succeeds("get", "serviceaccount", "default", "-n", "default"),
            )
        except BaseException:
            # Without containerd an import would try to reach it for ever.
            self._given_up = True
            for asking in list(self._asking):
                asking.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        (layout.state / "ready").touch()

    def _furnish_node(self, imports: Sequence[Future[None]]) -> None:
        """DNS, pretended GPUs, images: what makes a bare node one that tests can use."""
        text = string.Template((HERE / "manifests" / "coredns.yaml").read_text())
        names = {"image": settings.COREDNS_IMAGE, "address": self.layout.network.dns_ip}
        self._apply_text(text.substitute(names))
        self._until("node registered", lambda: self._succeeds("get", "node", settings.NODE))
        gpus = {"nvidia.com/gpu": str(settings.GPUS)}
        patch = json.dumps({"status": {"capacity": gpus, "allocatable": gpus}})
        self.kubectl(
            *("patch", "node", settings.NODE, "--subresource=status"),
            *("--type=merge", "-p", patch),
        )
        for done in imports:
            done.result()
        say(f"{len(imports)} images imported")
        self._until("node Ready", lambda: self._is_true("node", settings.NODE, "Ready"))
        ready = ("deployment", "coredns", "Available", "kube-system")
        self._until("DNS available", lambda: self._is_true(*ready))

    def _until(self, what: str, predicate: Callable[[], object]) -> None:
        def checked() -> object:
            if not self._is_running():
                log = (self.logs / "supervisor.log").read_text(errors="replace")
                raise ClusterError(f"the cluster ended while starting: {log[-2000:]}")
            started = self.components() if self.layout.control_socket.exists() else {}
            for name, facts in started.items():
                if facts["starts"] > MAX_STARTS:
                    log = (self.logs / f"{name}.log").read_text(errors="replace")
                    raise ClusterError(f"{name} ends again and again: {log[-2000:]}")
            return predicate()

        def explain() -> str:
            return f"logs in {self.layout.failure}"

        progress.wait_for(what, checked, START_S, 0.1, explain)
        say(what)

    def _containerd_answers(self) -> bool:
        return self._ctr("version").returncode == 0

    # --- kubectl

    def kubectl(
        self,
        *arguments: str,
        input: str | None = None,
        check: bool = True,
        timeout: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl. Raises `KubectlError` with what it said if it fails and `check` is set."""
        done = subprocess.run(
            [*self.kubectl_command(), *arguments],
            input=input,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
        )
        if check and done.returncode:
            said = done.stderr.strip() or done.stdout.strip()
            raise KubectlError(f"kubectl {' '.join(arguments)}: {said}")
        return done

    def kubectl_command(self) -> list[str]:
        """The program: our own build, else the machine's."""
        own = self.layout.bin / "devcluster"
        if own.exists():
            return [str(own), "kubectl"]
        if found := shutil.which("kubectl"):
            return [found]
        raise ClusterError("no kubectl; `python -m e2e.cluster build` makes one")

    def get(self, *arguments: str) -> Any:
        """`kubectl get ARGUMENTS -o json`, decoded."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json").stdout)

    def apply(
        self, manifests: Manifests, namespace: str = "", server_side: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """`kubectl apply` of YAML text, a file or folder, or dicts. Warnings are on its stderr."""
        return self._with_manifests("apply", manifests, namespace, server_side)

    def delete(self, manifests: Manifests, namespace: str = "") -> None:
        """`kubectl delete` of the same; what is not there is fine. Waits until it is gone."""
        self._with_manifests("delete", manifests, namespace)

    def _with_manifests(
        self, verb: str, manifests: Manifests, namespace: str, server_side: bool = False
    ) -> subprocess.CompletedProcess[str]:
        options = ["-n", namespace] if namespace else []
        if verb == "delete":
            options.append("--ignore-not-found")
        elif server_side:
            options += ["--server-side", "--force-conflicts"]
        if isinstance(manifests, Path):
            return self.kubectl(verb, *options, "-f", str(manifests))
        if isinstance(manifests, str):
            return self.kubectl(verb, *options, "-f", "-", input=manifests)
        items = [manifests] if isinstance(manifests, Mapping) else list(manifests)
        whole = {"apiVersion": "v1", "kind": "List", "items": items}
        return self.kubectl(verb, *options, "-f", "-", input=json.dumps(whole))

    def _apply_text(self, text: str) -> None:
        progress.wait_for(
            "first apply",
            lambda: self.kubectl("apply", "-f", "-", input=text, check=False).returncode == 0,
            30.0,
            explain=lambda: self.kubectl("apply", "-f", "-", input=text, check=False).stderr,
        )

    def _succeeds(self, *arguments: str) -> bool:
        return self.kubectl(*arguments, check=False).returncode == 0

    def _is_true(self, kind: str, name: str, condition: str, namespace: str = "default") -> bool:
        path = f'{{.status.conditions[?(@.type=="{condition}")].status}}'
        options = ("-n", namespace, "-o", f"jsonpath={path}")
        return self.kubectl("get", kind, name, *options, check=False).stdout == "True"

    def is_ready(self) -> bool:
        """Whether the API server says so, now."""
        done = self.kubectl("get", "--raw", "/readyz", check=False)
        return done.returncode == 0 and done.stdout == "ok"

    def wait_for(
        self,
        predicate: Callable[[], object],
        timeout: float = 60.0,
        what: str = "the predicate",
        interval: float = 0.2,
    ) -> None:
        """Until it is true; a kubectl that fails in it counts as not yet. Raises `WaitTimeout`."""
        last = ""

        def attempt() -> object:
            nonlocal last
            try:
                return predicate()
            except (KubectlError, subprocess.TimeoutExpired) as error:
                last = str(error)
                return False

        progress.wait_for(what, attempt, timeout, interval, lambda: last)

    def wait_deployment(self, name: str, namespace: str, timeout: float = 60.0) -> None:
        """Until all its pods run the current template and are available."""
        limit = f"--timeout={timeout:g}s"
        self.kubectl(
            *("rollout", "status", f"deployment/{name}", "-n", namespace, limit),
            timeout=timeout + 10.0,
        )

    def remove_namespace(self, name: str) -> None:
        """With all in it. Its pods are ended first: while there are any, the namespace's controller
        looks again only after half of the time that they may take. What is left goes some seconds
        later, as that controller lets five pass before it begins.
        """
        self.end_pods(name)
        self.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=false")

    def end_pods(self, namespace: str, timeout: float = 120.0) -> None:
        """All of a namespace, and what makes them. They get no time, as nobody listens to them any
        more."""
        space = ("-n", namespace)
        makers = ("deployments,statefulsets,daemonsets,jobs", "--all", "--wait=false")
        self.kubectl("delete", *makers, *space)

        def empty() -> bool:
            at_once = ("--grace-period=0", "--force")
            return "deleted" not in self.kubectl("delete", "pods", "--all", *at_once, *space).stdout

        self.wait_for(empty, timeout, f"no pods in {namespace}")

    def kill_containers(self, pod: str, namespace: str) -> None:
        """SIGKILL for the first processes of a pod's containers, and so for all of them, from the
        node: unlike a pod's deletion, however forced, nothing announces it. The kubelet starts the
        containers again."""
        if self.is_foreign:
            raise ClusterError("containers are killed only on a node of our own")
        for status in self.get("pod", pod, "-n", namespace)["status"]["containerStatuses"]:
            container = status["containerID"].removeprefix("containerd://")
            done = self._ctr("tasks", "kill", "--signal", "SIGKILL", container)
            if done.returncode:
                raise ClusterError(f"{namespace}/{pod}: {done.stderr.strip()}")

    # --- containerd

    def _ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = str(self.layout.bin / "ctr")
        socket_path = str(self.layout.containerd_socket)
        # It would try for ever to reach a containerd that is gone: it ends with who asks, however
        # that ends.
        die_with_parent = ("setpriv", "--pdeathsig", "KILL")
        with subprocess.Popen(
            [*die_with_parent, program, "-a", socket_path, "-n", "k8s.io", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as running:
            self._asking.add(running)
            if self._given_up:
                running.kill()
            out, err = running.communicate()
            self._asking.discard(running)
            return subprocess.CompletedProcess(running.args, running.returncode, out, err)

    # --- images

    def load_image(self, archive: Path) -> None:
        """Bring a docker-archive file's image onto the node, with the further names that a file
        `ARCHIVE.names` beside it gives it, one a line. Does nothing if that very file was
        loaded before."""
        if self.is_foreign or not self.has_pods:
            raise ClusterError("images are loaded only onto a node of our own")
        facts = archive.stat()
        loaded = self.layout.state / "loaded" / archive.name
        which = f"{archive.absolute()} {facts.st_size} {facts.st_mtime_ns}"
        if loaded.exists() and loaded.read_text() == which:
            return
        done = self._ctr("images", "import", "--local", str(archive))
        if done.returncode:
            raise ClusterError(f"{archive}: {done.stderr.strip()}")
        names = archive.with_name(f"{archive.name}.names")
        if names.exists():
            first, *others = names.read_text().split()
            for other in others:
                self._ctr("images", "tag", "--force", first, other)
        loaded.parent.mkdir(exist_ok=True)
        loaded.write_text(which)

    # --- fake nodes

    def add_kwok_nodes(self, count: int, timeout: float = 120.0) -> None:
        """`count` fake nodes `fake-0`…, each with GPUs, whose pods kwok pretends to run.

        They are labelled `type=kwok` and tainted `kwok=fake:NoSchedule`: only pods that tolerate
        it go there.
        """
        if self.is_foreign:
            raise ClusterError("fake nodes are added only to a cluster of our own")
        self._command("start", "kwok")
        resources = {
            "cpu": "64",
            "memory": "512Gi",
            "pods": "110",
            "nvidia.com/gpu": str(settings.GPUS),
        }
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {
                    "name": f"fake-{number}",
                    "labels": {"type": "kwok", "kubernetes.io/hostname": f"fake-{number}"},
                    "annotations": {"kwok.x-k8s.io/node": "fake"},
                },
                "spec": {"taints": [{"key": "kwok", "value": "fake", "effect": "NoSchedule"}]},
                "status": {"capacity": resources, "allocatable": resources},
            }
            for number in range(count)
        )

        def ready() -> bool:
            lines = self.kubectl("get", "node", "-l", "type=kwok", "--no-headers").stdout
            return sum(" Ready " in line for line in lines.splitlines()) >= count

        self.wait_for(ready, timeout, f"{count} fake nodes Ready")

    def remove_kwok_nodes(self) -> None:
        """The fake nodes and their pods, and kwok itself."""
        self.kubectl("delete", "node", "-l", "type=kwok", "--ignore-not-found")
        self._command("stop", "kwok")

    # --- outages

    def stop_apiserver(self) -> None:
        """Kill the API server and keep it down; everything else goes on."""
        self.stop_component("apiserver")

    def start_apiserver(self, timeout: float = 60.0) -> None:
        """Bring it back; returns when it is ready."""
        self._command("start", "apiserver")
        self.wait_for(self.is_ready, timeout, "API server ready", 0.1)

    def stop_component(self, name: str) -> None:
        """Kill a component (`etcd`, `scheduler`, …) and keep it down."""
        self._command("stop", name)

    def start_component(self, name: str) -> None:
        """Bring it back; returns at once."""
        self._command("start", name)

    def compact_etcd(self) -> int:
        """Throw away etcd's history; the revision up to which it is gone.

        An API server that starts after it answers 410 to watches and lists that continue from
        before; one that runs goes on answering from its memory what it has seen itself.
        """
        return int(self._command("compact")["revision"])

    def components(self) -> dict[str, dict[str, Any]]:
        """Component -> {"running": bool, "starts": int}."""
        return self._command("status")

    def _command(self, *words: str) -> dict[str, Any]:
        if self.is_foreign:
            raise ClusterError(f"{words[0]}: not on a cluster that isn't ours")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20.0)
            try:
                connection.connect(str(self.layout.control_socket))
            except OSError as error:
                raise ClusterError("the cluster is not up") from error
            connection.sendall(" ".join(words).encode() + b"\n")
            with connection.makefile() as answers:
                answer = dict(json.loads(answers.readline()))
        if "error" in answer:
            raise ClusterError(str(answer["error"]))
        return answer

    # --- add-ons

    def build_further(self, *names: str) -> None:
        """Build what of `on_demand.ON_DEMAND` is not built yet."""
        build.build(self.layout, self._with_node, [on_demand.ON_DEMAND[name] for name in names])

    def load_further_images(self, *names: str) -> None:
        """Bring onto the node what `build_further` built."""
        for name in names:
            self.load_image(self.layout.further_images / f"{name}.tar")

    def install_addon(self, name: str, timeout: float = 120.0) -> None:
        """One of `ADDONS`, and what it needs; does nothing if it is there. Returns when it works.

        Some are built first, which takes minutes.
        """
        addon = ADDONS.get(name)
        if addon is None:
            raise ClusterError(f"no add-on {name!r}; there are: {', '.join(ADDONS)}")
        if addon.deployment and not self.has_pods:
            raise ClusterError(f"{name}: {self.why_no_pods}")
        for other in addon.needs:
            self.install_addon(other, timeout)
        if addon.images:
            self.build_further(name)
            self.load_further_images(*addon.images)
        if addon.component:
            self.start_component(addon.component)
        found = addons.manifests(addon, (self.layout.manifests / addon.file).read_text())
        self.apply(found, server_side=True)
        limit = f"--timeout={timeout:g}s"
        if crds := addons.definitions(found):
            command = ("wait", "crd", *crds, "--for=condition=Established", limit)
            # It fails at once while a new one has no conditions at all.
            self.wait_for(lambda: self.kubectl(*command), timeout, "definitions established")
        if addon.deployment:
            self.wait_deployment(addon.deployment, addon.namespace, timeout)
        if addon.api_service:
            self.kubectl(
                *("wait", "apiservice", addon.api_service),
                *("--for=condition=Available", limit),
                timeout=timeout + 10.0,
            )
        if addon.gateway_class:
            command = ("wait", "gatewayclass", addon.gateway_class, "--for=condition=Accepted")
            self.wait_for(lambda: self.kubectl(*command), timeout, "GatewayClass accepted")

    # --- what happened

    def collect_logs(self, folder: Path) -> None:
        """Everything that tells what happened: components' and pods' logs, objects, events."""
        folder.mkdir(parents=True, exist_ok=True)
        if not self.is_foreign and self.logs.exists():
            shutil.copytree(self.logs, folder, dirs_exist_ok=True, symlinks=True)
        for file, arguments in {
            "events.txt": ("get", "events", "-A", "--sort-by=.lastTimestamp"),
            "objects.txt": ("get", "all,dgd,dgdsa,pvc,networkpolicy", "-A", "-o", "wide"),
            "pods.txt": ("describe", "pods", "-A"),
            "nodes.txt": ("describe", "nodes"),
        }.items():
            done = self.kubectl(*arguments, check=False)
            (folder / file).write_text(done.stdout + done.stderr)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


__all__ = ["ADDONS", "Cluster", "ClusterError", "KubectlError", "WaitTimeout"]
