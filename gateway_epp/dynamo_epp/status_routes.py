"""What the picker answers over HTTP: models, health, and the reasons of its decisions.

`/v1/models` and `/health` are what Envoy lets clients ask; the rest (`explain.debug_routes`) is on
the status server only, for those who run the cluster.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from dynamo_runtime.lifecycle import Lifecycle

from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.explain import Journal
from dynamo_epp.explain.debug_routes import add_debug_routes
from dynamo_epp.picker import KvPicker
from dynamo_epp.requests import error_body


def _json(data: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(data), status=status, content_type="application/json"
    )


def add_status_routes(
    app: web.Application,
    lifecycle: Lifecycle,
    pool: Pool,
    picker: KvPicker,
    journal: Journal,
    started_at: int,
) -> None:
    """Add the routes to a status server that has not started. ``started_at``: Unix seconds."""

    def describe(model: str, workers: list[Worker]) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "id": model,
            "object": "model",
            "created": started_at,
            "owned_by": "dynamo",
        }
        lengths = [worker.max_model_len for worker in workers if worker.max_model_len]
        if lengths:
            entry["max_model_len"] = min(lengths)
        if all(model in worker.loras for worker in workers):
            entry["parent"] = workers[0].model
        return entry

    async def models(_: web.Request) -> web.Response:
        served = sorted(pool.models(ready=True).items())
        return _json({"object": "list", "data": [describe(*each) for each in served]})

    async def model(request: web.Request) -> web.Response:
        name = request.match_info["model"]
        workers = pool.models(ready=True).get(name)
        if workers is None:
            text = error_body(
                404, f"The model {name!r} does not exist.", param="model", code="model_not_found"
            )
            return web.Response(body=text, status=404, content_type="application/json")
        return _json(describe(name, workers))

    async def health(_: web.Request) -> web.Response:
        ready = [w for w in pool.workers.values() if w.endpoint.ready]
        state = "healthy" if lifecycle.ready else "not_ready"
        return _json(
            {
                "status": state,
                "reason": lifecycle.reason,
                "endpoints": sorted(pool.models(ready=True)),
                "instances": [
                    {"name": w.name, "address": w.endpoint.hostport, "state": w.state()}
                    for w in ready
                ],
            },
            200 if lifecycle.ready else 503,
        )

    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{model:.*}", model)
    app.router.add_get("/health", health)
    add_debug_routes(app, journal, picker.state)
