"""A small API server in memory, on loopback: real versions, pages, watches, bookmarks, compaction.

It keeps the promises of the Kubernetes API that a client relies on, and can be told to break those
that a network breaks: answers fail, connections drop, history is gone.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = dict[str, Any]
Key = tuple[str, str, str]  # collection ("/api/v1/pods"), namespace, name


@dataclass(slots=True)
class Change:
    version: int
    key: Key
    before: Json | None
    after: Json | None  # None: deleted
    last: Json  # the object as the event shows it


@dataclass(slots=True, eq=False)
class Watch:
    collection: str
    namespace: str | None
    matches: Callable[[Json], bool]
    lines: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    bookmarks: bool = False
    transport: asyncio.BaseTransport | None = None

    def sees(self, change: Change) -> Json | None:
        """The event that this watch gets for ``change``."""
        collection, namespace, _ = change.key
        if collection != self.collection or self.namespace not in (None, namespace):
            return None
        was = change.before is not None and self.matches(change.before)
        fits = change.after is not None and self.matches(change.after)
        if not was and not fits:
            return None
        kind = "DELETED" if not fits else "MODIFIED" if was else "ADDED"
        return {"type": kind, "object": change.last}


class KubeApi:
    """The server's state and its tricks; ``serving`` puts it on a port."""

    def __init__(self) -> None:
        self.url = ""
        self.version = 1000
        self.objects: dict[Key, Json] = {}
        self.history: list[Change] = []
        self.compacted = 1000
        self.watches: set[Watch] = set()
        self.watch_opened = asyncio.Event()
        self.requests: list[tuple[str, str]] = []  # method, path
        self.seen: list[web.Request] = []
        self.failures: list[Callable[[web.Request], web.StreamResponse | None]] = []
        """Each takes one request, unless it answers None; it may raise to cut the connection."""
        self.interfere: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
        """Answers requests in the server's place, unless with None."""
        self.gone_as_event = True
        """How a watch from too far back is refused: 410 as an event, else as HTTP status."""
        self.piece = 1 << 20
        """Watch lines are written in pieces of so many bytes."""

    # --- the world ----------------------------------------------------------------------------

    def put(self, collection: str, item: Json) -> Json:
        """Create or replace an object, whoever may have changed it."""
        item = copy.deepcopy(item)
        metadata = item.setdefault("metadata", {})
        key = (collection, metadata.get("namespace", ""), metadata["name"])
        before = self.objects.get(key)
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        metadata["uid"] = before["metadata"]["uid"] if before else f"uid-{self.version}"
        self.objects[key] = item
        self._changed(Change(self.version, key, before, item, item))
        return item

    def delete(self, collection: str, namespace: str, name: str) -> Json:
        key = (collection, namespace, name)
        before = self.objects.pop(key)
        self.version += 1
        last = copy.deepcopy(before)
        last["metadata"]["resourceVersion"] = str(self.version)
        self._changed(Change(self.version, key, before, None, last))
        return last

    def _changed(self, change: Change) -> None:
        self.history.append(change)
        for watch in self.watches:
            if event := watch.sees(change):
                watch.lines.put_nowait(_line(event))

    def compact(self) -> None:
        """Forget what was before now."""
        self.compacted = self.version
        self.history.clear()

    def bookmark(self) -> None:
        metadata = {"resourceVersion": str(self.version)}
        event = _line({"type": "BOOKMARK", "object": {"kind": "X", "metadata": metadata}})
        for watch in self.watches:
            if watch.bookmarks:
                watch.lines.put_nowait(event)

    def say(self, event: Json) -> None:
        for watch in self.watches:
            watch.lines.put_nowait(_line(event))

    def end_watches(self) -> None:
        """As at the end of their time."""
        for watch in list(self.watches):
            watch.lines.put_nowait(None)

    def drop_watches(self) -> None:
        """As when a load balancer dies."""
        for watch in list(self.watches):
            if isinstance(watch.transport, asyncio.Transport):
                watch.transport.abort()

    def fail(self, status: int, *, times: int = 1, headers: dict[str, str] | None = None) -> None:
        for _ in range(times):
            self.failures.append(lambda _: failure(status, "Injected", "injected", headers))

    def at(self, collection: str, version: int) -> dict[Key, Json]:
        """The collection as it was."""
        state = {key: item for key, item in self.objects.items() if key[0] == collection}
        for change in reversed(self.history):
            if change.version <= version or change.key[0] != collection:
                continue
            if change.before is None:
                state.pop(change.key, None)
            else:
                state[change.key] = change.before
        return state

    # --- HTTP ---------------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        self.seen.append(request)
        if self.interfere is not None and (answer := await self.interfere(request)) is not None:
            return answer
        if self.failures and (answer := self.failures.pop(0)(request)) is not None:
            return answer
        collection, namespace, name, subresource = _parse(request.path)
        if name is None:
            if request.method == "POST":
                return await self._create(request, collection, namespace)
            if "watch" in request.query:
                return await self._watch(request, collection, namespace)
            return self._list(request, collection, namespace)
        key = (collection, namespace or "", name)
        if request.method == "PATCH":
            return await self._patch(request, key, subresource)
        if key not in self.objects:
            return failure(404, "NotFound", f'{collection.rsplit("/", 1)[1]} "{name}" not found')
        if request.method == "PUT":
            body = await request.json()
            version = body["metadata"].get("resourceVersion")
            if version not in (None, self.objects[key]["metadata"]["resourceVersion"]):
                return failure(409, "Conflict", "the object has been modified")
            return web.json_response(self.put(collection, body))
        if request.method == "DELETE":
            wanted = (await request.json()).get("preconditions") or {}
            metadata = self.objects[key]["metadata"]
            if any(metadata.get(name) != value for name, value in wanted.items()):
                return failure(409, "Conflict", "the preconditions do not hold")
            return web.json_response(self.delete(*key))
        return web.json_response(self.objects[key])

    async def _create(
        self, request: web.Request, collection: str, namespace: str | None
    ) -> web.Response:
        body = await request.json()
        if (collection, namespace or "", body["metadata"]["name"]) in self.objects:
            return failure(409, "AlreadyExists", "already exists")
        if request.query.get("dryRun"):
            return web.json_response(body, status=201)
        return web.json_response(self.put(collection, body), status=201)

    async def _patch(self, request: web.Request, key: Key, subresource: str | None) -> web.Response:
        body = await request.json()
        before = self.objects.get(key)
        apply = request.content_type == "application/apply-patch+yaml"
        if before is None and not apply:
            return failure(404, "NotFound", "not found")
        if request.content_type == "application/json-patch+json":
            item = copy.deepcopy(before)
            for operation in body:
                *path, last = operation["path"].strip("/").split("/")
                target: Any = item
                for part in path:
                    target = target[int(part)] if isinstance(target, list) else target[part]
                if operation["op"] == "test" and target.get(last) != operation["value"]:
                    return failure(422, "Invalid", "the test failed")
                if operation["op"] in ("add", "replace"):
                    target[last] = operation["value"]
        else:
            item = merged(before or {}, body)
        assert item is not None
        if item == before:
            return web.json_response(before)
        if request.query.get("dryRun"):
            return web.json_response(item)
        return web.json_response(self.put(key[0], item))

    def _list(self, request: web.Request, collection: str, namespace: str | None) -> web.Response:
        version, after = self.version, ("", "", "")
        if token := request.query.get("continue"):
            version, *rest = json.loads(base64.b64decode(token))
            after = (rest[0], rest[1], rest[2])
            if version < self.compacted:
                return failure(410, "Expired", "the provided continue parameter is too old")
        matches = _selector(request)
        found = sorted(
            (key, item)
            for key, item in self.at(collection, version).items()
            if namespace in (None, key[1]) and matches(item)
        )
        found = [(key, item) for key, item in found if key > after]
        metadata: Json = {"resourceVersion": str(version)}
        limit = int(request.query.get("limit", 0))
        if limit and len(found) > limit:
            found = found[:limit]
            token = json.dumps([version, *found[-1][0]])
            metadata["continue"] = base64.b64encode(token.encode()).decode()
        return web.json_response(
            {"kind": "List", "metadata": metadata, "items": [item for _, item in found]}
        )

    async def _watch(
        self, request: web.Request, collection: str, namespace: str | None
    ) -> web.StreamResponse:
        since = int(request.query["resourceVersion"])
        watch = Watch(collection, namespace, _selector(request))
        watch.bookmarks = request.query.get("allowWatchBookmarks") == "true"
        if since < self.compacted:
            gone = failure(410, "Expired", f"too old resource version: {since}")
            if not self.gone_as_event:
                return gone
            status = json.loads(gone.body)  # type: ignore[arg-type]
            watch.lines.put_nowait(_line({"type": "ERROR", "object": status}))
            watch.lines.put_nowait(None)
        for change in self.history:
            if change.version > since and (event := watch.sees(change)):
                watch.lines.put_nowait(_line(event))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        watch.transport = request.transport
        self.watches.add(watch)
        try:
            await response.prepare(request)
            self.watch_opened.set()
            while (line := await watch.lines.get()) is not None:
                for start in range(0, len(line), self.piece):
                    await response.write(line[start : start + self.piece])
        except ConnectionError:
            pass  # dropped
        finally:
            self.watches.discard(watch)
        return response


def failure(
    status: int, reason: str, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    body = {"kind": "Status", "code": status, "reason": reason, "message": message}
    return web.json_response(body, status=status, headers=headers)


def merged(old: Json, new: Json) -> Json:
    """``old`` with a JSON merge patch; close enough to server-side apply by a single manager."""
    result = copy.deepcopy(old)
    for key, value in new.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _line(event: Json) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _parse(path: str) -> tuple[str, str | None, str | None, str | None]:
    """Collection, namespace, name, subresource."""
    parts = path.strip("/").split("/")
    size = 2 if parts[0] == "api" else 3
    root, rest = parts[:size], parts[size:]
    namespace = None
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    plural, name, subresource = (*rest, None, None)[:3]
    return "/" + "/".join([*root, str(plural)]), namespace, name, subresource


def _selector(request: web.Request) -> Callable[[Json], bool]:
    terms = [t.split("=", 1) for t in request.query.get("labelSelector", "").split(",") if t]

    def matches(item: Json) -> bool:
        labels = item["metadata"].get("labels") or {}
        return all(labels.get(key) == value for key, value in terms)

    return matches


@asynccontextmanager
async def serving() -> AsyncIterator[KubeApi]:
    """A fresh API server on a free port of loopback."""
    api = KubeApi()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield api
    finally:
        api.end_watches()
        await runner.cleanup()
