"""A cache of the objects of one kind that follows the API server.

A reconcile must cost no request, so it reads from here. The cache is level-triggered: whatever was
missed (a broken connection, a compacted history, an API server that was away) ends in a new list,
and what vanished in between is reported as deleted. That last part is what decides whether a cache
can be trusted, and it needs the cache itself, which a mere stream of events does not have.

Protocol: https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing

from dynamo_runtime.kubernetes.client import (
    ApiError,
    ApiUnreachable,
    Json,
    KubernetesClient,
    error_of,
)
from dynamo_runtime.kubernetes.resources import Resource

log = logging.getLogger(__name__)

Name = tuple[str, str]
"""(namespace, name); the namespace of cluster-wide objects is ""."""

PAGE = 500
"""Objects of one page of a list, as client-go has it."""
WATCH_SECONDS = (240, 480)
"""After so long the server ends a watch; random, so that not all come back at once."""
SILENCE_S = 120.0
"""Bookmarks come about once a minute. A watch silent for so long hangs on a dead connection, or on
a version that the server has yet to reach (its etcd was restored from a backup): list anew."""
BACKOFF_S = (0.5, 10.0)
"""Pause after the first failure in a row, and the most; doubling, with jitter."""
SHORT_WATCH_S = 1.0
"""A server that ends watches sooner than this is not asked again at once."""
DOUBTFUL_AFTER = 3
"""So many watches refused in a row, and the version they start from is no longer trusted."""


def identity(item: Json) -> Json:
    return item


class Informer:
    """Keeps ``objects`` equal to what the API server has, for as long as ``run`` runs.

    ``on_change(old, new)`` is called for each object that differs, after it was stored: old is
    None for one that is new, new is None for one that is gone. ``transform`` cuts off what is not
    needed, before anything is stored or compared; None means that the object is as good as not
    there. Both must not block, and neither can stop the informer by failing.
    """

    def __init__(
        self,
        client: KubernetesClient,
        resource: Resource,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        transform: Callable[[Json], Json | None] = identity,
        on_change: Callable[[Json | None, Json | None], None] = lambda old, new: None,
        on_problem: Callable[[str], None] = lambda problem: None,
        on_list: Callable[[str], None] = lambda version: None,
        rng: random.Random,
        name: str = "",
        backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:
        """``namespace`` None: all of them. ``on_problem`` gets each new ``problem``, and "" when it
        is over; ``on_list`` the resourceVersion of each list, once ``objects`` are in step with it.
        ``name`` is for the log."""
        self.objects: dict[Name, Json] = {}
        self.synced = asyncio.Event()  # a first list is in ``objects``
        self.last_heard = time.monotonic()  # of an answer, event or bookmark
        self.problem = ""
        """Why the cache can't be kept current at the moment, in a sentence; "" while it is."""
        self.lists = 0
        self.relists = 0  # lists after the first one
        self.watch_errors = 0
        self.resource = resource
        self.namespace = namespace
        self.name = name or resource.full_name + (f" in {namespace}" if namespace else "")
        self._client = client
        self._path = resource.path(namespace)
        self._selectors = {
            key: value
            for key, value in (("labelSelector", label_selector), ("fieldSelector", field_selector))
            if value
        }
        self._transform = transform
        self._on_change = on_change
        self._on_problem = on_problem
        self._on_list = on_list
        self._rng = rng
        self._backoff_s = backoff_s
        self._version: str | None = None  # where the next watch begins; None: list first
        self._refreshing = asyncio.Event()  # somebody wants a new list
        self._listed = asyncio.Condition()  # notified after each list

    async def run(self) -> None:
        """Follow the API server until cancelled."""
        failures = refused = 0
        while True:
            began = time.monotonic()
            try:
                if self._version is None or self._refreshing.is_set():
                    self._version = await self._list()
                await self._until_refreshed(self._watch(self._version))
                failures = refused = 0
                if time.monotonic() - began < SHORT_WATCH_S:
                    failures = 1
            except ApiError as error:
                # A watch that was heard of before it failed is a fresh start.
                failures = 1 if self.last_heard > began else failures + 1
                refused = 0 if isinstance(error, ApiUnreachable) else refused + 1
                self.watch_errors += self._version is not None
                if self._version is not None and (_outdated(error) or refused >= DOUBTFUL_AFTER):
                    log.info("%s: listing anew: %s", self.name, error)
                    self._version = None
                else:
                    self._report(error)
            except Exception:
                log.exception("%s: listing anew after a failure of our own", self.name)
                failures, self._version = failures + 1, None
            if failures:
                least, most = self._backoff_s
                pause = min(most, least * 2 ** min(failures - 1, 10))
                await asyncio.sleep(pause * self._rng.uniform(0.5, 1.0))

    async def refresh(self) -> None:
        """List anew; return when ``objects`` are what the API server had at some moment since this
        was called. A watch that hangs on a dead connection tells nothing for minutes."""
        before = self.lists
        self._refreshing.set()
        async with self._listed:
            await self._listed.wait_for(lambda: self.lists > before)

    async def _until_refreshed(self, watch: Coroutine[None, None, None]) -> None:
        watching = asyncio.ensure_future(watch)
        wanted = asyncio.ensure_future(self._refreshing.wait())
        try:
            await asyncio.wait((watching, wanted), return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        finally:
            for task in (watching, wanted):
                task.cancel()
            await asyncio.gather(watching, wanted, return_exceptions=True)

    def _report(self, error: ApiError) -> None:
        problem = str(error)
        if error.status in (401, 403):
            where = f"namespace {self.namespace}" if self.namespace else "all namespaces"
            problem = (
                f"needs a role that allows list and watch of {self.resource.full_name} "
                f"in {where}: {error.message}"
            )
        if problem != self.problem:
            log.warning("%s: %s; what is known stays in force", self.name, problem)
            self.problem = problem
            self._on_problem(problem)

    def _heard(self) -> None:
        self.last_heard = time.monotonic()
        if self.problem:
            log.info("%s: the API server answers again", self.name)
            self.problem = ""
            self._on_problem("")

    # --- list ---------------------------------------------------------------------------------

    async def _list(self) -> str:
        """Bring ``objects`` in step with a list; the version that a watch continues from."""
        self._refreshing.clear()
        self._version = None  # a list that fails is tried again: whoever wanted it still does
        try:
            listed, version = await self._pages(PAGE)
        except ApiError as error:
            if error.status != 410:
                raise
            listed, version = await self._pages(None)  # pages expired: all at once, then
        self.lists += 1
        self.relists = self.lists - 1
        for name in [name for name in self.objects if name not in listed]:
            self._remove(name)
        for name, item in listed.items():
            self._store(name, item)
        self.synced.set()
        self._on_list(version)
        async with self._listed:
            self._listed.notify_all()
        return version

    async def _pages(self, limit: int | None) -> tuple[dict[Name, Json], str]:
        listed: dict[Name, Json] = {}
        params: dict[str, str | int] = {**self._selectors}
        if limit is not None:
            params["limit"] = limit
        while True:
            page = await self._client.get(self._path, **params)
            self._heard()
            for item in page.get("items") or ():
                # Lists of built-in kinds don't repeat these in each object; events do.
                item.setdefault("apiVersion", self.resource.api_version)
                item.setdefault("kind", self.resource.kind)
                listed[_name(item)] = item
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                return listed, str(metadata["resourceVersion"])
            params["continue"] = metadata["continue"]

    # --- watch --------------------------------------------------------------------------------

    async def _watch(self, version: str) -> None:
        """Follow changes since ``version`` until the server ends the watch."""
        params: dict[str, str | int] = {
            **self._selectors,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": self._rng.randint(*WATCH_SECONDS),
        }
        async with aclosing(
            self._client.watch(self._path, params, timeout_s=SILENCE_S, on_open=self._heard)
        ) as events:
            async for event in events:
                item = event["object"]
                match event["type"]:
                    case "ADDED" | "MODIFIED":
                        self._store(_name(item), item)
                    case "DELETED":
                        self._remove(_name(item))
                    case "ERROR":
                        raise error_of(item)
                self._heard()
                self._version = str(item["metadata"]["resourceVersion"])

    # --- changes ------------------------------------------------------------------------------

    def _store(self, name: Name, item: Json) -> None:
        old = self.objects.get(name)
        try:
            new = self._transform(item)
        except Exception:
            log.exception("%s: %s/%s could not be cut; it is left out", self.name, *name)
            new = None
        if new is None:
            self._remove(name)
        elif new != old:
            self.objects[name] = new
            self._tell(old, new)

    def _remove(self, name: Name) -> None:
        old = self.objects.pop(name, None)
        if old is not None:
            self._tell(old, None)

    def _tell(self, old: Json | None, new: Json | None) -> None:
        try:
            self._on_change(old, new)
        except Exception:
            log.exception("%s: a change could not be handled", self.name)


def _name(item: Json) -> Name:
    metadata = item["metadata"]
    return metadata.get("namespace") or "", metadata["name"]


def _outdated(error: ApiError) -> bool:
    """The history that we want to go on from is gone, or is not (any more) the server's."""
    if error.status == 410 or (isinstance(error, ApiUnreachable) and error.reason == "Timeout"):
        return True
    causes = (error.body.get("details") or {}).get("causes") or ()
    return any(cause.get("reason") == "ResourceVersionTooLarge" for cause in causes)


class Informers:
    """Several kinds, in one namespace, several or all: informers that run and sync as one.

    An account that is restricted to some namespaces may not list across them, so there is one
    informer for each namespace and kind.
    """

    def __init__(
        self, client: KubernetesClient, *, namespaces: Sequence[str] | None, rng: random.Random
    ) -> None:
        """``namespaces`` None: all of them."""
        self._client = client
        self._namespaces = namespaces
        self._rng = rng
        self._members: dict[Resource, list[Informer]] = {}

    def add(
        self,
        resource: Resource,
        *,
        label_selector: str = "",
        field_selector: str = "",
        transform: Callable[[Json], Json | None] = identity,
        on_change: Callable[[Json | None, Json | None], None] = lambda old, new: None,
        on_list: Callable[[Resource, str | None, str], None] = lambda kind, place, version: None,
    ) -> None:
        """Follow ``resource``; before ``run``. ``on_list`` also gets the resource and the namespace
        (None: all); the rest is as for ``Informer``."""
        everywhere = self._namespaces is None or not resource.namespaced
        for namespace in (None,) if everywhere else self._namespaces or ():
            informer = Informer(
                self._client,
                resource,
                namespace=namespace,
                label_selector=label_selector,
                field_selector=field_selector,
                transform=transform,
                on_change=on_change,
                on_list=functools.partial(on_list, resource, namespace),
                rng=self._rng,
            )
            self._members.setdefault(resource, []).append(informer)

    def __iter__(self) -> Iterator[Informer]:
        return itertools.chain.from_iterable(self._members.values())

    async def run(self) -> None:
        """Run them all until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in self:
                group.create_task(informer.run(), name=f"informer {informer.name}")

    async def refresh(self) -> None:
        """List everything anew, and wait for that."""
        await asyncio.gather(*(informer.refresh() for informer in self))

    async def synced(self) -> None:
        """Return once each of them has had its first list."""
        for informer in self:
            await informer.synced.wait()

    def get(self, resource: Resource, namespace: str, name: str) -> Json | None:
        """The object; ``namespace`` "" for cluster-wide kinds. None for what is not there."""
        for informer in self._members[resource]:
            if (found := informer.objects.get((namespace, name))) is not None:
                return found
        return None

    def objects(self, resource: Resource) -> Iterator[Json]:
        """All objects of one kind."""
        for informer in self._members[resource]:
            yield from informer.objects.values()

    @property
    def last_heard(self) -> float:
        """When the one that was silent for longest was last heard of; monotonic seconds."""
        return min((informer.last_heard for informer in self), default=time.monotonic())

    @property
    def problems(self) -> list[str]:
        """What keeps caches from being current at the moment."""
        return [f"{informer.name}: {informer.problem}" for informer in self if informer.problem]
