"""`dynamo up` as users meet it: a process with an exit status that leaves nothing behind."""

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dynamo_cli.local.up import Unreadable, read_graph

# Runs a graph that is rendered already: what is inside the pods is this test's own.
DRIVER = """
import json, pathlib, sys
from dynamo_cli.local.up import Graph, Options, run_graph
manifests, command, state, timeout = json.loads(sys.argv[1])
options = Options(pathlib.Path("graph.yaml"), command, state and pathlib.Path(state), timeout)
sys.exit(run_graph(Graph("g", "default", tuple(manifests)), options))
"""
SERVE = (
    "import http.server as h, os; h.ThreadingHTTPServer((os.environ['POD_IP'], 8000), "
    "h.SimpleHTTPRequestHandler).serve_forever()"
)


def deployment(name: str, *command: str, replicas: int = 1, **spec: Any) -> dict[str, Any]:
    main = {
        "name": "main",
        "image": "dynamo-platform/worker",
        "command": list(command) or ["python3", "-c", SERVE],
        "ports": [{"name": "http", "containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}},
    }
    labels = {"nvidia.com/dynamo-component-type": name.rpartition("-")[2]}
    spec = {"containers": [main], "terminationGracePeriodSeconds": 5, **spec}
    template = {"metadata": {"labels": labels}, "spec": spec}
    return {
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "template": template},
    }


GRAPH = [
    deployment("g-frontend"),
    deployment(
        "g-worker",
        replicas=2,
        initContainers=[
            {"name": "i", "image": "dynamo-platform/worker", "command": ["sleep", "0.3"]}
        ],
    ),
]


class Machine:
    """A temporary folder and a mark in the environment, both looked at when all is over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = f"HF_TEST_MARK={uuid.uuid4()}"  # HF_* is passed on to pods
        name, _, value = self.mark.partition("=")
        self.env = {
            **os.environ,
            name: value,
            "TMPDIR": str(folder / "t"),
            "XDG_RUNTIME_DIR": str(folder / "r"),
        }
        for part in ("t", "r"):
            (folder / part).mkdir()
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self,
        manifests: list[dict[str, Any]],
        command: str | None = None,
        state: Path | None = None,
        timeout: float | None = None,
        **streams: Any,
    ) -> subprocess.Popen[str]:
        arguments = json.dumps([manifests, command, state and str(state), timeout])
        streams = streams or {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, arguments],
            env=self.env,
            text=True,
            cwd=self.folder,
            start_new_session=True,
            **streams,
        )
        self._started.append(process)
        return process

    def processes(self) -> list[str]:
        """Command lines of everything that carries the mark."""
        found = []
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdigit() and self.mark.encode() in (
                    process / "environ"
                ).read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def leftovers(self) -> list[str]:
        paths = [*(self.folder / "t").iterdir(), *(self.folder / "r").iterdir()]
        return [str(path) for path in paths]

    def wait_until_clean(self, limit_s: float = 10) -> None:
        deadline = time.monotonic() + limit_s
        while (self.processes() or self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.processes() == []
        assert self.leftovers() == []

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.close()
    made.wait_until_clean()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Lines of stderr up to one that matches."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f"ended without {pattern!r}:\n{seen}")


def test_exec_runs_when_all_is_ready_and_gives_its_status(machine: Machine) -> None:
    command = (
        "curl -sf $DYNAMO_URL/ >/dev/null && cat $DYNAMO_STATE_DIR/endpoints.json"
        " && command -v python >&2; exit 7"
    )
    process = machine.start(GRAPH, command)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7
    endpoints = json.loads(out)["endpoints"]  # stdout is the command's alone
    assert [(e["name"], e["ready"]) for e in endpoints] == [
        ("g-worker-0", True), ("g-worker-1", True),
    ]  # fmt: skip
    assert str(Path(sys.executable).parent) in err
    assert machine.processes() == []
    assert machine.leftovers() == []


def test_without_exec_it_says_where_and_how_and_ctrl_c_ends_it(machine: Machine) -> None:
    process = machine.start(GRAPH)
    text = read_until(process, "Ctrl-C ends everything")
    url = re.search(r"ready: (http://127\.\d+\.\d+\.\d+:8000)", text)
    assert url is not None
    assert f"curl -N {url[1]}/v1/chat/completions" in text
    assert "dynamo chat" in text
    assert len(list((machine.folder / "r/dynamo").iterdir())) == 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert machine.processes() == []
    assert machine.leftovers() == []


@pytest.mark.parametrize("moment", ["g-frontend-0 .* starting", "g-frontend-0 .* ready"])
def test_ctrl_c_while_starting_leaves_nothing(machine: Machine, moment: str) -> None:
    process = machine.start(GRAPH)
    read_until(process, moment)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert machine.processes() == []
    assert machine.leftovers() == []


@pytest.mark.parametrize("delay", [0.1, 0.4, 0.6])
def test_ctrl_c_at_any_moment_leaves_nothing(machine: Machine, delay: float) -> None:
    process = machine.start(GRAPH)
    time.sleep(delay)  # any moment: also before there is anything to wait for
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    machine.wait_until_clean()


def test_a_second_ctrl_c_forces_and_leaves_nothing(machine: Machine) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVE
    process = machine.start([deployment("g-frontend", "python3", "-c", deaf)])
    read_until(process, "Ctrl-C ends everything")
    process.send_signal(signal.SIGINT)
    read_until(process, "stopping")
    time.sleep(0.6)  # closer together the two would count as one
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
    machine.wait_until_clean()


def test_killing_it_leaves_nothing(machine: Machine) -> None:
    # A pod's grandchild in a session of its own dies, too.
    script = f'setsid sleep 71 & exec python3 -c "{SERVE}"'
    process = machine.start([deployment("g-frontend", "sh", "-c", script)])
    read_until(process, "Ctrl-C ends everything")
    assert any("sleep 71" in line for line in machine.processes())
    process.kill()
    process.communicate()
    machine.wait_until_clean()


def test_ctrl_c_during_exec_ends_the_command(machine: Machine) -> None:
    process = machine.start(GRAPH, "echo begun >&2; sleep 72; echo never")
    read_until(process, "begun")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "never" not in out
    assert machine.leftovers() == []


def test_two_at_once_do_not_collide(machine: Machine) -> None:
    wait = "echo $DYNAMO_URL; read line; curl -sf $DYNAMO_URL/ >/dev/null"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [machine.start(GRAPH, wait, **streams) for _ in range(2)]
    urls = {p.stdout.readline() for p in both if p.stdout}
    assert len(urls) == 2
    assert all(url.startswith("http://127.") for url in urls)
    for process in both:
        process.communicate("go\n", timeout=30)
        assert process.returncode == 0


def test_a_worker_that_dies_at_start_fails_with_its_log(machine: Machine) -> None:
    dies = deployment("g-worker", "sh", "-c", "echo no weights here >&2; exit 5")
    process = machine.start([deployment("g-frontend"), dies], "true")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "g-worker-0: exited with status 5; again in 1 s:\n    no weights here" in err
    assert "g-worker-0: container 'main' failed 3 times without becoming ready" in err
    kept = re.search(r"logs are kept in (\S+)", err)
    assert kept is not None
    assert (Path(kept[1]) / "g-worker-0/main.log").read_text().startswith("no weights here")
    subprocess.run(["rm", "-r", kept[1]], check=True)


def test_a_timeout_says_what_was_waited_for(machine: Machine) -> None:
    process = machine.start([deployment("g-worker", "sleep", "73")], "true", timeout=1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "not ready after 1 s: g-worker-0: readiness: port 8000: Connection refused" in err
    kept = re.search(r"logs are kept in (\S+)", err)
    assert kept is not None
    subprocess.run(["rm", "-r", kept[1]], check=True)


def test_a_port_in_use_is_one_clear_line(machine: Machine) -> None:
    graph = json.loads(json.dumps(GRAPH))
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        graph[0]["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = port
        process = machine.start(graph, "true")
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert f"port {port} is in use on all addresses by " in err
    assert f"(pid {os.getpid()})" in err


def test_a_missing_program_is_one_clear_line(machine: Machine) -> None:
    process = machine.start([deployment("g-worker", "no-such-program")], "true")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == "g-worker, container 'main': program 'no-such-program' is not on this machine\n"


@pytest.mark.parametrize("state", ["/proc/nope", "/dev/null"])
def test_a_state_dir_that_can_not_be_used_is_one_clear_line(machine: Machine, state: str) -> None:
    process = machine.start(GRAPH, "true", Path(state))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.fullmatch(rf"--state-dir {state}: .+\n", err)


def test_a_given_state_dir_is_kept_with_its_logs(machine: Machine) -> None:
    state = machine.folder / "state"
    process = machine.start(GRAPH, "curl -sf $DYNAMO_URL/ >/dev/null", state)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(str(p.relative_to(state)) for p in state.rglob("*.log")) == [
        "g-frontend-0/main.log", "g-worker-0/i.log", "g-worker-0/main.log",
        "g-worker-1/i.log", "g-worker-1/main.log",
    ]  # fmt: skip
    assert "GET / HTTP" in (state / "g-frontend-0/main.log").read_text()


def test_on_a_terminal_there_is_a_live_table(machine: Machine) -> None:
    leader, follower = pty.openpty()
    machine.env["TERM"] = "xterm"
    seen = machine.folder / "seen"  # the init container waits until the table has shown it
    init = {
        "name": "i",
        "image": "dynamo-platform/worker",
        "command": ["sh", "-c", f"until test -e {seen}; do sleep 0.05; done"],
    }
    graph = [deployment("g-worker", initContainers=[init])]
    process = machine.start(graph, "true", stdout=follower, stderr=follower)
    os.close(follower)
    text = b""
    while select.select([leader], [], [], 30)[0]:
        try:
            text += os.read(leader, 65536)
        except OSError:
            break  # the other end is closed
        if b"init i: running" in text:
            seen.touch()
    os.close(leader)
    assert process.wait(timeout=30) == 0
    assert b"waits for" in text
    assert b"127." in text
    assert text.rindex(b"\x1b[?25h") > text.rindex(b"\x1b[?25l")  # the cursor is shown again


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file or directory"),
        ("kind: Pod\napiVersion: v1\n", "holds Pod; `dynamo up` runs one DynamoGraphDeployment"),
        ("a: [1", r"graph\.yaml:\d"),
        (
            "apiVersion: nvidia.com/v1beta1\nkind: DynamoGraphDeployment\n"
            "metadata: {name: g}\nspec: {components: [{name: A, replica: 2}]}\n",
            "replica",
        ),
    ],
)
def test_files_that_are_no_graph(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "graph.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(Unreadable, match=says) as caught:
        read_graph(file)
    assert all(line.startswith(str(file)) for line in caught.value.lines)


@pytest.mark.parametrize("name", ["quickstart", "vllm-cpu", "vllm-stock"])
def test_the_examples_render_without_notes(name: str) -> None:
    graph = read_graph(Path(__file__).parents[2] / "examples" / f"{name}.yaml")
    assert graph.notes == ()
    kinds = [m["kind"] for m in graph.manifests]
    assert kinds.count("Deployment") == 2
