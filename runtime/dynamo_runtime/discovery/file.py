"""Endpoints from a file: what the local runner writes and the pickers of its graph read."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict
from pathlib import Path

import msgspec

from dynamo_runtime.discovery.source import problem_of
from dynamo_runtime.endpoint import Endpoint

log = logging.getLogger(__name__)


class _EndpointsFile(msgspec.Struct):
    endpoints: list[Endpoint]


class InvalidEndpoints(Exception):
    """An endpoints file that doesn't say what it should; the message names file and field."""


def read_endpoints(path: Path) -> tuple[Endpoint, ...]:
    """The endpoints in ``path``. Raises ``InvalidEndpoints`` or ``FileNotFoundError``."""
    try:
        parsed = msgspec.json.decode(path.read_bytes(), type=_EndpointsFile)
    except msgspec.DecodeError as error:
        raise InvalidEndpoints(f"{path}: {error}") from error
    names: set[str] = set()
    for endpoint in parsed.endpoints:
        if problem := problem_of(endpoint):
            raise InvalidEndpoints(f"{path}: endpoint {endpoint.name!r}: {problem}")
        if endpoint.name in names:
            raise InvalidEndpoints(f"{path}: two endpoints are named {endpoint.name!r}")
        names.add(endpoint.name)
    return tuple(parsed.endpoints)


def write_endpoints(path: Path, endpoints: Iterable[Endpoint]) -> None:
    """Replace ``path`` in one step: a reader sees the old snapshot or the new one."""
    data = msgspec.json.format(
        msgspec.json.encode({"endpoints": [asdict(endpoint) for endpoint in endpoints]}), indent=1
    )
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class FileEndpointSource:
    """Endpoints from a JSON file ``{"endpoints": [{…fields of Endpoint…}]}``.

    The file is looked at every ``interval_s`` seconds. One that is missing counts as empty; one
    that can't be read or understood is reported in the log, and the last good snapshot stays in
    force.
    """

    def __init__(self, path: Path | str, interval_s: float = 0.2) -> None:
        self._path = Path(path)
        self._interval_s = interval_s

    async def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        seen: tuple[int, int, int] | None = None
        last: tuple[Endpoint, ...] | None = None
        problem = ""
        while True:
            before, problem = problem, ""
            try:
                stat = self._path.stat()
                version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                current = last
                if version != seen:
                    seen = version
                    current = read_endpoints(self._path)
            except FileNotFoundError:
                seen, current = None, ()
            except InvalidEndpoints as error:
                log.error("%s; keeping the last good endpoints", error)
                current = last if last is not None else ()
            except OSError as error:
                seen, current = None, last if last is not None else ()
                problem = f"{self._path}: {error.strerror}"
                if problem != before:
                    log.error("%s; keeping the last good endpoints", problem)
            if current is not None and current != last:
                last = current
                yield current
            await asyncio.sleep(self._interval_s)
