"""`dynamo up` from file to exit status: read, refuse or run, wait, tell, end.

Whatever goes wrong ends in one clear line (or one for each mistake in the file) and status 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from dynamo_runtime.lifecycle import Lifecycle, run
from rich.console import Console

from dynamo_cli.local import keeper
from dynamo_cli.local.addresses import NoAddress, PortTaken
from dynamo_cli.local.images import own_folder
from dynamo_cli.local.plan import Plan, Refusals, make_plan
from dynamo_cli.local.runner import NotReady, Runner
from dynamo_cli.local.session import CannotKeepState, Session
from dynamo_cli.local.view import View

EXEC_TIMEOUT_S = 600.0
GIVE_UP_AFTER = 3  # runs of a container that fail before it was ready, with --exec
COMMAND_GRACE_S = 5.0
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True, slots=True)
class Options:
    file: Path
    command: str | None = None  # --exec
    state_dir: Path | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """What a file says: the graph's name, and everything that is to run."""

    name: str
    namespace: str
    manifests: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()


class Unreadable(Exception):
    """A file that gives no graph; one line for each reason."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


def read_graph(file: Path) -> Graph:
    """The graph in ``file``, rendered, with the ConfigMaps and Secrets beside it.

    Raises ``Unreadable``.
    """
    from dynamo_crds.load import load_documents, parse_graph
    from dynamo_crds.problem import InvalidManifest
    from dynamo_operator.render import render_with_notes
    from dynamo_operator.render.platform import Platform

    try:
        documents = load_documents(file)
    except OSError as error:
        raise Unreadable([f"{file}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise Unreadable([f"{file}: not a text file in UTF-8"]) from error
    except InvalidManifest as error:
        raise Unreadable([str(problem) for problem in error.problems]) from error
    graphs = [document for document in documents if document.is_graph]
    if len(graphs) != 1:
        kinds = ", ".join(dict.fromkeys(d.kind or "no kind" for d in documents)) or "nothing"
        found = f"holds {kinds}" if not graphs else f"holds {len(graphs)} graphs"
        raise Unreadable([f"{file}: {found}; `dynamo up` runs one DynamoGraphDeployment"])
    try:
        graph = parse_graph(graphs[0])
    except InvalidManifest as error:
        raise Unreadable([str(problem) for problem in error.problems]) from error
    platform = Platform(read_only_root=False)
    rendered = render_with_notes(graph, platform)
    beside = [d.data for d in documents if d.kind in ("ConfigMap", "Secret")]
    return Graph(
        name=graph.metadata.name or file.stem,
        namespace=graph.metadata.namespace or platform.namespace,
        manifests=(*map(_with_content, rendered.manifests), *beside),
        notes=tuple(str(note) for note in rendered.notes),
    )


def _with_content(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """A Secret is rendered empty: here, as the operator does it, a new run makes its content."""
    if manifest["kind"] != "Secret":
        return manifest
    from dynamo_operator.render.names import PAIRING_SECRET_KEY

    return {**manifest, "stringData": {PAIRING_SECRET_KEY: secrets.token_hex(32)}}


def run_up(options: Options) -> int:
    """Run `dynamo up`; return its exit status."""
    try:
        graph = read_graph(options.file)
    except Unreadable as error:
        view = View(Console(stderr=True))
        for line in error.lines:
            view.error(line)
        return 1
    return run_graph(graph, options)


def run_graph(graph: Graph, options: Options) -> int:
    """Run a graph that has been read and rendered; return the exit status."""
    view = View(Console(stderr=True))
    try:
        plan = make_plan(graph.manifests, namespace=graph.namespace, environ=os.environ)
    except Refusals as error:
        for line in error.lines:
            view.error(line)
        return 1
    for note in (*graph.notes, *plan.notes):
        view.line(f"note: {note}", "dim")
    try:
        return run(lambda lifecycle: _serve(lifecycle, options, graph.name, plan, view))
    finally:
        view.close_table()


async def _serve(lifecycle: Lifecycle, options: Options, graph: str, plan: Plan, view: View) -> int:
    # A closed terminal ends the run in good order too.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGHUP, lifecycle.request_stop, "the terminal was closed"
        )
    try:
        session = Session(options.state_dir)
    except (CannotKeepState, NoAddress) as error:
        view.error(str(error))
        return 1
    except OSError as error:
        view.error(f"{error.filename or 'temporary folder'}: {error.strerror or error}")
        return 1
    runner = Runner(plan, session, graph=graph, on_line=view.line, on_change=view.show)
    failed = True
    try:
        status, failed = await _run(lifecycle, options, runner, view)
        return status
    finally:
        view.close_table()
        kept = failed and session.temporary_state and any(session.state.rglob("*.log"))
        await runner.stop()
        await session.close(keep_state=kept)
        if kept:
            view.line(f"logs are kept in {session.state}")


async def _run(
    lifecycle: Lifecycle, options: Options, runner: Runner, view: View
) -> tuple[int, bool]:
    """Start, wait, serve. Returns (exit status, whether something failed)."""
    stop = asyncio.create_task(lifecycle.stop_requested.wait())
    try:
        try:
            notes = await runner.start()
        except Refusals as error:
            for line in error.lines:
                view.error(line)
            return 1, False
        except PortTaken as error:
            view.error(str(error))
            return 1, False
        for note in notes:
            view.line(f"note: {note}", "dim")
        view.open()
        view.show(runner.pods)
        with_command = options.command is not None
        waiting = asyncio.create_task(
            runner.wait_ready(
                timeout_s=options.timeout_s or (EXEC_TIMEOUT_S if with_command else None),
                give_up_after=GIVE_UP_AFTER if with_command else None,
                waiting=view.remind,
            )
        )
        try:
            await asyncio.wait([waiting, stop], return_when=asyncio.FIRST_COMPLETED)
            view.close_table()
            if not waiting.done():
                view.line(f"{lifecycle.reason}: stopping before all was ready")
                return INTERRUPTED, runner.troubled
            waiting.result()
        except NotReady as error:
            view.close_table()
            view.error(str(error))
            return 1, True
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        if options.command is not None:
            view.line(f"ready: {runner.url}", "green")
            status = await _command(options.command, runner, stop)
            return status, runner.troubled
        await _tell(runner, view)
        await stop
        view.line(f"{lifecycle.reason}: stopping (again to force)")
        return 0, False
    finally:
        stop.cancel()


async def _command(command: str, runner: Runner, stop: asyncio.Task[bool]) -> int:
    """Run the command of ``--exec`` on the user's terminal; return its exit status."""
    path = os.pathsep.join([str(own_folder()), os.environ.get("PATH", os.defpath)])
    env = {
        **os.environ,
        "PATH": path,
        "DYNAMO_URL": runner.url,
        "DYNAMO_STATE_DIR": str(runner.session.state),
        keeper.MARKER: f"{runner.session.id}/exec/",
    }
    # In our own process group, unlike a pod: it may talk to the terminal.
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", command, env=env)
    ended = asyncio.create_task(process.wait())
    await asyncio.wait([ended, stop], return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait([ended], timeout=COMMAND_GRACE_S)
        await asyncio.to_thread(keeper.sweep, f"{runner.session.id}/exec/")
        await ended
        return INTERRUPTED
    status = ended.result()
    return status if status >= 0 else 128 - status


async def _tell(runner: Runner, view: View) -> None:
    """Say where the endpoint is and how to ask it."""
    if not runner.url:
        view.line("ready; the graph has no frontend, so there is no URL", "green")
        return
    body = json.dumps({
        "model": await _a_model(runner.url) or "MODEL",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
    })  # fmt: skip
    view.line(f"\nready: {runner.url}", "green")
    view.line(
        f"\n  curl -N {runner.url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f"    -d '{body}'\n"
        "\n  dynamo chat       talk to it, in another terminal"
        "\n  dynamo explain    why a request went where it went"
        f"\n\nlogs: {runner.session.state}; Ctrl-C ends everything\n"
    )


async def _a_model(url: str) -> str:
    """The first model the frontend names; "" if it names none."""
    timeout = aiohttp.ClientTimeout(total=5)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as client,
            client.get(f"{url}/v1/models") as response,
        ):
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
        return ""
