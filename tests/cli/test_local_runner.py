"""Pods as real processes: order, restarts, probes, hooks, scaling, and what is left at the end."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from dynamo_cli.local import keeper
from dynamo_cli.local.plan import Refusals, make_plan
from dynamo_cli.local.record import running_ups
from dynamo_cli.local.runner import NotReady, Runner
from dynamo_cli.local.session import Session
from dynamo_runtime.discovery import read_endpoints

IMAGE = "dynamo-platform/worker"
# A server that serves its folder and says in the log when it is told to stop.
SERVER = """
import http.server, os, signal, sys
def stop(number, frame):
    print("told to stop", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
handler = http.server.SimpleHTTPRequestHandler
server = http.server.ThreadingHTTPServer((os.environ["POD_IP"], 8000), handler)
print("serving", flush=True)
server.serve_forever()
"""
HTTP = {"httpGet": {"path": "/", "port": "http"}}
PORTS = [{"name": "http", "containerPort": 8000}]


def container(code: str = SERVER, **fields: Any) -> dict[str, Any]:
    return {"name": "main", "image": IMAGE, "command": ["python3", "-c", code], **fields}


def shell(script: str, **fields: Any) -> dict[str, Any]:
    return {"name": "main", "image": IMAGE, "command": ["sh", "-c", script], **fields}


def deployment(
    *containers: dict[str, Any], name: str = "g-worker", replicas: int = 1, **spec: Any
) -> dict[str, Any]:
    labels = {
        "nvidia.com/dynamo-component-type": name.rpartition("-")[2],
        "nvidia.com/dynamo-worker-hash": "abc",
    }
    spec.setdefault("terminationGracePeriodSeconds", 5)
    template = {"metadata": {"labels": labels}, "spec": {"containers": list(containers), **spec}}
    return {
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "template": template},
    }


class Run:
    """A runner with what it told the user."""

    def __init__(self, runner: Runner, lines: list[str]) -> None:
        self.runner = runner
        self.lines = lines
        self._changed = asyncio.Event()

    def note(self, *_: object) -> None:
        self._changed.set()

    async def until(self, condition: Callable[[], bool], limit_s: float = 20) -> None:
        """Wait for a condition, looked at after each change (and now and then)."""
        async with asyncio.timeout(limit_s):
            while not condition():
                self._changed.clear()
                try:
                    async with asyncio.timeout(0.05):
                        await self._changed.wait()
                except TimeoutError:
                    continue

    async def ready(self) -> None:
        await self.runner.wait_ready(timeout_s=30, give_up_after=None)

    def log(self, pod: str = "g-worker-0", name: str = "main") -> str:
        path = self.runner.session.state / pod / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def endpoint(self, name: str = "g-worker-0") -> Any:
        endpoints = read_endpoints(self.runner.session.state / "endpoints.json")
        return next((e for e in endpoints if e.name == name), None)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder and a runtime folder of the test's own, both empty again at the end."""
    temporary, runtime = tmp_path / "t", tmp_path / "r"
    temporary.mkdir()
    runtime.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    yield tmp_path
    assert list(temporary.iterdir()) == []
    assert list(runtime.iterdir()) == []


@asynccontextmanager
async def running(*manifests: dict[str, Any], start: bool = True) -> AsyncIterator[Run]:
    plan = make_plan(manifests, namespace="ns", environ=os.environ)
    lines: list[str] = []
    session = Session(None)
    runner = Runner(
        plan, session, graph="g", on_line=lines.append, on_change=lambda pods: run.note()
    )
    run = Run(runner, lines)
    try:
        if start:
            await runner.start()
        yield run
    finally:
        await runner.stop(grace_s=2)
        await session.close(keep_state=False)
        assert keeper.marked(f"{session.id}/") == []


async def test_pods_serve_on_their_own_addresses_and_the_endpoints_file_says_so(
    folders: Path,
) -> None:
    async with running(deployment(container(ports=PORTS, readinessProbe=HTTP), replicas=2)) as run:
        assert [run.endpoint(f"g-worker-{n}").ready for n in (0, 1)] == [False, False]
        await run.ready()
        first, second = run.endpoint("g-worker-0"), run.endpoint("g-worker-1")
        assert first.ready
        assert second.ready
        assert first.address != second.address
        assert (first.port, first.role, first.generation) == (8000, "worker", "abc")
        (record,) = running_ups()
        assert record.pid == os.getpid()
        assert [pod.address for pod in record.pods] == [first.address, second.address]
        assert record.ready


async def test_environment_volumes_and_init_containers(folders: Path) -> None:
    show = (
        "import os, json, pathlib\n"
        "print(json.dumps([os.environ['NAME'], os.environ['REF'], os.environ['TMPDIR'],\n"
        "    os.environ['DYN_HTTP_HOST'], os.environ['DYN_DISCOVERY_BACKEND'],\n"
        "    pathlib.Path(os.environ['FILE']).read_text(),\n"
        "    pathlib.Path('/cfg/c.yaml').read_text(),\n"
        "    'HIDDEN' in os.environ, os.getcwd()]), flush=True)\n"
        "import signal; signal.pause()"
    )
    mounts = [{"name": "m", "mountPath": "/models"}, {"name": "c", "mountPath": "/cfg"}]
    manifest = deployment(
        container(
            show,
            env=[
                {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "REF", "value": "$(NAME)@$(POD_IP)"},
                {"name": "FILE", "value": "/models/deep/x.txt"},
            ],
            volumeMounts=mounts,
        ),
        initContainers=[
            shell("mkdir /models/deep; echo one >> /models/deep/x.txt", name="a",
                  volumeMounts=mounts[:1]),
            shell("echo two >> /models/deep/x.txt", name="b", volumeMounts=mounts[:1]),
        ],
        volumes=[{"name": "m", "emptyDir": {}}, {"name": "c", "configMap": {"name": "cm"}}],
    )  # fmt: skip
    config = {"kind": "ConfigMap", "metadata": {"name": "cm"}, "data": {"c.yaml": "k: v"}}
    os.environ["HIDDEN"] = "x"
    try:
        async with running(config, manifest) as run:
            await run.until(lambda: run.log().endswith("\n"))
            name, ref, tmp, host, backend, text, cfg, hidden, cwd = json.loads(run.log())
            pod = run.runner.pods[0]
            assert (name, ref, host) == ("g-worker-0", f"g-worker-0@{pod.address}", pod.address)
            assert (backend, text, cfg, hidden) == ("file", "one\ntwo\n", "k: v", False)
            assert tmp.startswith(str(run.runner.session.scratch))
            assert cwd.startswith(str(run.runner.session.scratch))
    finally:
        del os.environ["HIDDEN"]


async def test_a_container_that_ends_is_restarted_with_back_off_and_its_log_shown(
    folders: Path,
) -> None:
    async with running(deployment(shell("echo run; echo the reason >&2; exit 3"))) as run:
        began = time.monotonic()
        await run.until(lambda: run.log().count("run") == 2)
        assert time.monotonic() - began >= 1
        assert (
            "g-worker-0: exited with status 3; again in 1 s:\n    run\n    the reason" in run.lines
        )
        await run.until(lambda: any("again in 2 s" in line for line in run.lines))


async def test_our_own_json_log_is_shown_readably(folders: Path) -> None:
    line = json.dumps({"ts": "x", "level": "ERROR", "message": "no model", "exception": "a\nb"})
    async with running(deployment(shell(f"echo '{line}'; exit 1".replace("\\", "\\\\")))) as run:
        await run.until(lambda: bool(run.lines))
        assert run.lines[0].endswith("again in 1 s:\n    ERROR no model\n    a\n    b")


async def test_wait_ready_gives_up_on_a_container_that_keeps_failing(folders: Path) -> None:
    async with running(deployment(shell("exit 3", readinessProbe=HTTP, ports=PORTS))) as run:
        with pytest.raises(
            NotReady, match=r"container 'main' failed 2 times .*status 3.*main\.log"
        ):
            await run.runner.wait_ready(timeout_s=30, give_up_after=2)
        assert run.runner.troubled


async def test_not_ready_in_time_says_what_is_waited_for(folders: Path) -> None:
    async with running(deployment(shell("sleep 60", readinessProbe=HTTP, ports=PORTS))) as run:
        with pytest.raises(NotReady, match="g-worker-0: readiness: port 8000: Connection refused"):
            await run.runner.wait_ready(timeout_s=1, give_up_after=None)


async def test_init_containers_are_repeated_until_they_succeed(folders: Path) -> None:
    mount = {"volumeMounts": [{"name": "m", "mountPath": "/m"}]}
    manifest = deployment(
        shell("echo started; sleep 60"),
        initContainers=[shell("test -e /m/x || { touch /m/x; exit 1; }", name="init", **mount)],
        volumes=[{"name": "m", "emptyDir": {}}],
    )
    async with running(manifest) as run:
        await run.until(
            lambda: any("g-worker-0/init: exited with status 1" in x for x in run.lines)
        )
        assert run.log() == ""
        await run.until(lambda: "started" in run.log())
        await run.ready()


async def test_a_sidecar_starts_before_and_ends_after_the_main_container(folders: Path) -> None:
    told = "trap 'date +%s%N; exit 0' TERM; date +%s%N; while :; do sleep 0.1; done"
    sidecar = shell(told, name="side", restartPolicy="Always",
                    startupProbe={"exec": {"command": ["true"]}})  # fmt: skip
    async with running(deployment(shell(told), initContainers=[sidecar])) as run:
        await run.ready()
        await run.until(lambda: run.log() != "" and run.log(name="side") != "")
        session = run.runner.session
        await run.runner.stop()
        main = [int(x) for x in (session.state / "g-worker-0/main.log").read_text().split()]
        side = [int(x) for x in (session.state / "g-worker-0/side.log").read_text().split()]
        assert side[0] < main[0] < main[1] < side[1]


async def test_a_failed_liveness_probe_restarts_the_container(folders: Path) -> None:
    probe = {"exec": {"command": ["test", "!", "-e", "/m/sick"]}, "periodSeconds": 1,
             "failureThreshold": 1}  # fmt: skip
    manifest = deployment(
        shell("echo up; rm -f /m/sick; touch /m/there; sleep 60", livenessProbe=probe,
              volumeMounts=[{"name": "m", "mountPath": "/m"}]),
        volumes=[{"name": "m", "emptyDir": {}}],
    )  # fmt: skip
    async with running(manifest) as run:
        await run.until(lambda: "up" in run.log())
        volume = next(run.runner.session.scratch.glob("*/v/m"))
        await run.until((volume / "there").exists)
        (volume / "sick").touch()
        await run.until(lambda: run.log().count("up") == 2)
        assert any("liveness probe failed (exit status 1): restarting it" in x for x in run.lines)


async def test_losing_readiness_takes_the_pod_out_of_the_endpoints(folders: Path) -> None:
    probe = {"exec": {"command": ["test", "!", "-e", "/m/busy"]}, "periodSeconds": 1,
             "failureThreshold": 1}  # fmt: skip
    manifest = deployment(
        shell("sleep 60", readinessProbe=probe, volumeMounts=[{"name": "m", "mountPath": "/m"}]),
        volumes=[{"name": "m", "emptyDir": {}}],
    )
    async with running(manifest) as run:
        await run.ready()
        busy = next(run.runner.session.scratch.glob("*/v/m")) / "busy"
        busy.touch()
        await run.until(lambda: not run.endpoint().ready)
        busy.unlink()
        await run.until(lambda: run.endpoint().ready)
        assert run.runner.pods[0].restarts == 0


async def test_at_the_end_the_endpoint_terminates_before_the_process_is_told(folders: Path) -> None:
    # On SIGTERM the program writes what the endpoints file says at that moment.
    code = (
        "import os, signal, sys\n"
        "def stop(number, frame):\n"
        "    print(open(os.environ['DYN_ENDPOINTS_FILE']).read(), flush=True); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print(flush=True)\n"
        "signal.pause()"
    )
    async with running(deployment(container(code))) as run:
        await run.until(lambda: run.log() == "\n")
        await run.runner.stop()
        (endpoint,) = json.loads(run.log())["endpoints"]
        assert (endpoint["ready"], endpoint["terminating"]) == (False, True)


async def test_pre_stop_runs_before_sigterm_and_within_the_grace_period(folders: Path) -> None:
    hook = {"exec": {"command": ["sh", "-c", "echo hook >> /m/order"]}}
    script = "trap 'echo term >> /m/order; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    manifest = deployment(
        shell(script, lifecycle={"preStop": hook}, volumeMounts=[{"name": "m", "mountPath": "/m"}]),
        volumes=[{"name": "m", "emptyDir": {}}],
    )
    async with running(manifest) as run:
        await run.until(lambda: "up" in run.log())
        order = next(run.runner.session.scratch.glob("*/v/m")) / "order"
        pod = run.runner.pods[0]
        await pod.stop()
        assert order.read_text().split() == ["hook", "term"]


async def test_what_ignores_sigterm_is_killed_with_all_it_started(folders: Path) -> None:
    # The grandchild has a session of its own: only the marker can find it.
    script = "trap '' TERM; setsid sleep 61 & echo up; while :; do sleep 0.1; done"
    async with running(deployment(shell(script), terminationGracePeriodSeconds=1)) as run:
        await run.until(lambda: "up" in run.log())
        session = run.runner.session
        assert len(keeper.marked(f"{session.id}/")) >= 2
        began = time.monotonic()
        await run.runner.stop()
        assert 1 <= time.monotonic() - began < 10
        assert keeper.marked(f"{session.id}/") == []


async def test_leftovers_of_a_dead_container_are_gone_before_it_restarts(folders: Path) -> None:
    async with running(deployment(shell("setsid sleep 62 & echo up; exit 1"))) as run:
        await run.until(lambda: run.log().count("up") == 2)
        await run.until(lambda: any("again in 2 s" in line for line in run.lines))
        assert keeper.marked(f"{run.runner.session.id}/") == []


async def test_scaling(folders: Path) -> None:
    async with running(deployment(container(ports=PORTS, readinessProbe=HTTP))) as run:
        await run.ready()
        await run.runner.scale("g-worker", 3)
        assert not run.runner.ready
        await run.ready()
        assert [pod.name for pod in run.runner.pods] == ["g-worker-0", "g-worker-1", "g-worker-2"]
        await run.runner.scale("g-worker", 1)
        assert [pod.name for pod in run.runner.pods] == ["g-worker-0"]
        assert run.endpoint("g-worker-2") is None
        assert "told to stop" in run.log("g-worker-2")
        await run.runner.scale("g-worker", 0)
        assert run.runner.pods == []
        await run.runner.scale("g-worker", 1)
        await run.ready()
        with pytest.raises(KeyError):
            await run.runner.scale("unknown", 1)


async def test_nothing_starts_when_a_program_or_a_value_is_missing(folders: Path) -> None:
    wrong = shell("true", name="side")
    wrong["command"] = ["no-such-program"]
    env = [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "k"}}}]
    manifest = deployment(wrong, name="a-worker")
    other = deployment(shell("true", env=env), name="b-worker")
    async with running(manifest, other, start=False) as run:
        with pytest.raises(Refusals) as caught:
            await run.runner.start()
        assert "program 'no-such-program' is not on this machine" in caught.value.lines[0]
        assert "ConfigMap 'none' is not in the file" in caught.value.lines[1]
        assert keeper.marked(f"{run.runner.session.id}/") == []


async def test_the_keeper_cleans_up_after_a_runner_that_is_killed(tmp_path: Path) -> None:
    victim = tmp_path / "folder"
    victim.mkdir()

    async def sleep(marker: str | None) -> asyncio.subprocess.Process:
        env = {"PATH": os.environ["PATH"]} | ({keeper.MARKER: marker} if marker else {})
        return await asyncio.create_subprocess_exec("sleep", "63", env=env, start_new_session=True)

    marked, untitled = await sleep("test-run-1/pod/main/0/"), await sleep(None)
    spared = [await sleep("test-run-10/x/"), await sleep(None), await sleep(None)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, keeper.__file__, "test-run-1", stdin=asyncio.subprocess.PIPE
    )
    told = [f"remove {victim}", f"group {untitled.pid}"]
    # A group that has ended: its number may be another's by now.
    told += [f"group {spared[1].pid}", f"ended {spared[1].pid}"]
    try:
        # End of input without "done" is the death of the runner.
        await process.communicate("".join(f"{line}\n" for line in told).encode())
        assert await marked.wait() == -9
        assert await untitled.wait() == -9
        assert not victim.exists()
        assert [one.returncode for one in spared] == [None, None, None]
    finally:
        for one in spared:
            one.kill()
            await one.wait()
