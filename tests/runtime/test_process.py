"""Lifecycle and children, as real processes see them."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from dynamo_runtime.child import Child
from dynamo_runtime.lifecycle import Lifecycle, Phase


async def gone(pid: int) -> None:
    """Until process ``pid`` has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def start(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)], stdout=subprocess.PIPE, text=True
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


STUBBORN = """
    import asyncio, sys
    from dynamo_runtime.child import Child
    from dynamo_runtime.lifecycle import run
    async def main(lifecycle):
        child = await Child.start([sys.executable, "-c",
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "print('up', flush=True); time.sleep(600)"],
            on_line=lambda line: print(child_line(line), flush=True))
        holder.append(child)
        await lifecycle.stop_requested.wait()
        print("draining", flush=True)
        await child.wait()
        return 0
    holder = []
    def child_line(line): return f"child {holder[0].pid}" if holder else "child"
    sys.exit(run(main))
"""


def test_first_signal_drains_second_forces() -> None:
    process = start(STUBBORN)
    child = int(line(process).split()[1])
    process.send_signal(signal.SIGTERM)
    assert line(process) == "draining"
    while process.poll() is None:  # signals within half a second count as one
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 128 + signal.SIGTERM
    assert process.stdout is not None
    process.stdout.close()
    asyncio.run(asyncio.wait_for(gone(child), 5))


def test_children_die_with_a_killed_parent() -> None:
    process = start(STUBBORN)
    child = int(line(process).split()[1])
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    asyncio.run(asyncio.wait_for(gone(child), 5))


async def test_stop_kills_the_whole_group_after_the_grace() -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    child = await Child.start(
        ["sh", "-c", "trap '' TERM; sleep 600 & echo $!; wait; wait"], on_line=lines.put_nowait
    )
    grandchild = int(await lines.get())
    assert await child.stop(0.05) == -signal.SIGKILL
    await asyncio.wait_for(gone(grandchild), 5)


async def test_output_comes_line_by_line_with_the_last_one_unfinished() -> None:
    lines: list[str] = []
    child = await Child.start(
        ["sh", "-c", "echo one; echo two >&2; printf three; exit 7"], on_line=lines.append
    )
    assert await child.wait() == 7
    assert lines == ["one", "two", "three"]


async def test_a_missing_program_is_an_error_at_start() -> None:
    with pytest.raises(FileNotFoundError):
        await Child.start(["/does/not/exist"])


def test_phases_move_forward() -> None:
    lifecycle = Lifecycle()
    lifecycle.set_ready()
    lifecycle.set_not_ready("no endpoints")
    assert (lifecycle.ready, lifecycle.reason) == (False, "no endpoints")
    lifecycle.set_ready()
    lifecycle.request_stop("test")
    lifecycle.set_ready()
    lifecycle.set_not_ready("late")
    assert (lifecycle.phase, lifecycle.reason) == (Phase.DRAINING, "test")
