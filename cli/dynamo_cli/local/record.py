"""Where other commands find a run: `dynamo chat` needs its URL, `dynamo explain` its frontends.

One JSON file for each run in a folder that only this user can read. A record whose process is gone
is removed by whoever meets it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec


class PodRecord(msgspec.Struct, frozen=True):
    name: str
    address: str
    role: str  # component type: frontend, worker, prefill, decode, …
    port: int  # HTTP
    status_port: int | None  # port named `system`; None if the pod has none
    pid: int | None  # of the first main container; None while it isn't running
    ready: bool


class UpRecord(msgspec.Struct, frozen=True):
    """One running `dynamo up`."""

    pid: int
    started: int  # in clock ticks since boot: tells a reused pid from the same process
    graph: str
    namespace: str
    url: str  # of the frontend; "" if the graph has none
    state_dir: str
    ready: bool
    pods: list[PodRecord]


def runtime_folder() -> Path:
    """The folder of the records; it exists only while there is one."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and Path(base).is_dir():  # `su` leaves the variable of a session that is not there
        return Path(base) / "dynamo"
    return Path(tempfile.gettempdir()) / f"dynamo-{os.getuid()}"


def make_runtime_folder() -> Path:
    """Make the folder of the records if it is missing.

    Raises ``PermissionError`` for a folder under /tmp that belongs to somebody else.
    """
    folder = runtime_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to another user or is open to others' writing")
    return folder


def started(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot; ``None`` if it isn't running."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold spaces and parentheses
    return None if fields[0] in ("Z", "X") else int(fields[19])


def write_record(path: Path, record: UpRecord) -> None:
    """Replace the record at ``path`` in one step."""
    make_runtime_folder()  # another run that ended may have removed it
    temporary = path.with_suffix(".new")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
    temporary.replace(path)


def running_ups() -> list[UpRecord]:
    """Every run of this user, the oldest first; stale records are removed on the way."""
    found: list[UpRecord] = []
    record: UpRecord | None
    for path in runtime_folder().glob("up-*.json"):
        try:
            record = msgspec.json.decode(path.read_bytes(), type=UpRecord)
        except FileNotFoundError:
            continue
        except msgspec.DecodeError:
            record = None
        if record is not None and started(record.pid) == record.started:
            found.append(record)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda record: record.started)
