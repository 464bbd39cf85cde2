"""The API server's scale subresource for one machine: what a planner asks, and what it sets.

A Unix socket in the run's private folder answers `GET` and `PATCH …/<adapter>/scale` with the same
objects as Kubernetes, so that a planner scales pods here as it does there. Nothing else is served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

log = logging.getLogger(__name__)

_PATH = "/apis/nvidia.com/{version}/namespaces/{namespace}/{kind}/{name}/scale"
_KIND = "dynamographdeploymentscalingadapters"
MOST_REPLICAS = 200
"""A number above this is a mistake: a machine has about as many addresses for pods."""


class _Spec(msgspec.Struct):
    replicas: int


class _Patch(msgspec.Struct):
    spec: _Spec


class ScaleServer:
    """Serves the scales of Deployments, by their adapters' names.

    ``wanted(deployment)`` and ``ready(deployment)`` tell the numbers of replicas, ``scale`` sets
    one and returns when pods that go have gone: that is waited for by nobody.
    """

    def __init__(
        self,
        socket: Path,
        deployments: Mapping[str, str],  # adapter -> Deployment
        *,
        wanted: Callable[[str], int],
        ready: Callable[[str], int],
        scale: Callable[[str, int], Awaitable[None]],
    ) -> None:
        self._socket = socket
        self._deployments = deployments
        self._wanted = wanted
        self._ready = ready
        self._scale = scale
        self._scaling: set[asyncio.Task[None]] = set()
        app = web.Application()
        app.router.add_get(_PATH, self._get)
        app.router.add_patch(_PATH, self._patch)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)

    async def start(self) -> None:
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._socket)).start()

    async def stop(self) -> None:
        """No more orders; those that are being carried out go on by themselves."""
        await self._runner.cleanup()
        self._socket.unlink(missing_ok=True)

    def _deployment(self, request: web.Request) -> str | None:
        if request.match_info["kind"] != _KIND:
            return None
        return self._deployments.get(request.match_info["name"])

    async def _get(self, request: web.Request) -> web.Response:
        deployment = self._deployment(request)
        if deployment is None:
            return _refused(404, "NotFound", f"{request.path}: no such scale on this machine")
        return self._answer(request, deployment)

    async def _patch(self, request: web.Request) -> web.Response:
        deployment = self._deployment(request)
        if deployment is None:
            return _refused(404, "NotFound", f"{request.path}: no such scale on this machine")
        try:
            replicas = msgspec.json.decode(await request.read(), type=_Patch).spec.replicas
        except msgspec.DecodeError as error:
            return _refused(400, "BadRequest", str(error))
        if not 0 <= replicas <= MOST_REPLICAS:
            message = f"spec.replicas is {replicas}; it must be 0 to {MOST_REPLICAS}"
            return _refused(422, "Invalid", message)
        task = asyncio.ensure_future(self._scale(deployment, replicas))
        self._scaling.add(task)
        task.add_done_callback(self._scaled)
        await asyncio.sleep(0)  # it has set the number by now
        return self._answer(request, deployment)

    def _scaled(self, task: asyncio.Task[None]) -> None:
        self._scaling.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("scaling failed: %s", error)

    def _answer(self, request: web.Request, deployment: str) -> web.Response:
        scale = {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": {
                "name": request.match_info["name"],
                "namespace": request.match_info["namespace"],
            },
            "spec": {"replicas": self._wanted(deployment)},
            "status": {"replicas": self._ready(deployment)},
        }
        return _json(200, scale)


def _refused(status: int, reason: str, message: str) -> web.Response:
    return _json(
        status,
        {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "message": message,
            "code": status,
        },
    )


def _json(status: int, body: Mapping[str, Any]) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json"
    )
