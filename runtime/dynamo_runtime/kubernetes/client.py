"""A thin client of the API server: JSON in, JSON out, errors as the server words them.

Manifests are plain dictionaries everywhere in this platform, so a client with a class for each kind
would only convert back and forth. What is here is what such a client gets right or wrong: time
limits on everything, connections kept, being told to wait, watches whose lines have any length.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from dynamo_runtime.kubernetes import resources
from dynamo_runtime.kubernetes.access import Access, access_from

log = logging.getLogger(__name__)

Json = dict[str, Any]

OnRequest = Callable[[str, str, int, float], None]
"""Told of each request: method, resource (`pods`, `deployments/status`), status (0: no answer),
seconds until the answer, or, of a watch, until its first byte."""

CONNECTIONS = 32
"""Requests at a time; watches have connections of their own."""
CONNECT_TIMEOUT_S = 5.0
WAIT_RETRIES = 2
WAIT_LIMIT_S = 5.0
"""A server that says when to ask again is obeyed so many times, for at most so long each time."""
APPLY = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"


class ApiError(Exception):
    """The API server refused or failed; the message is its own."""

    def __init__(self, status: int, reason: str, message: str, body: Json | None = None) -> None:
        super().__init__(f"{message} ({status} {reason})" if status else message)
        self.status = status  # of HTTP; 0: no answer
        self.reason = reason  # as the Status object has it: NotFound, Conflict, Expired, …
        self.message = message
        self.body = body or {}  # the Status object

    @property
    def namespace_ends(self) -> bool:
        """Nothing new can be in that namespace: it is being deleted."""
        causes = (self.body.get("details") or {}).get("causes") or ()
        return any(cause.get("reason") == "NamespaceTerminating" for cause in causes)


class ApiUnreachable(ApiError):
    """No answer: refused or reset, or (``reason`` Timeout) none in time.

    Whether a write took effect is not known.
    """

    def __init__(self, message: str, reason: str = "Unreachable") -> None:
        super().__init__(0, reason, message)


class KubernetesClient:
    """One API server. Make it with ``from_environment`` and close it.

    Concurrent use is what it is for. Every method raises ``ApiError``, and its subclass
    ``ApiUnreachable`` when there was no answer.
    """

    def __init__(
        self, access: Access, *, user_agent: str, on_request: OnRequest | None = None
    ) -> None:
        """Needs a running event loop. ``user_agent`` is what the server's audit log shows."""
        self.namespace = access.namespace
        """Of the pod or of the kubeconfig's context, else "default"."""
        self.fence: Callable[[str], None] | None = None
        """Called right before a request that may change something is sent, at every attempt, with
        the namespace of what it changes ("": none); what it raises (no `OSError`) keeps that from
        being sent, and is what the caller gets. A leader that hung holds connections and half-done
        work when it comes to, and must not go on."""
        self._access = access
        self._on_request = on_request
        self._renewing = asyncio.Lock()
        self._warned: set[str] = set()
        headers = {"User-Agent": user_agent}
        trace = aiohttp.TraceConfig()
        # With a connection at hand, before its first byte; waiting for one may take seconds.
        trace.on_request_headers_sent.append(self._check_fence)
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, keepalive_timeout=60),
            trace_configs=[trace],
        )
        self._watches = aiohttp.ClientSession(
            headers=headers, connector=aiohttp.TCPConnector(limit=0)
        )

    @classmethod
    async def from_environment(
        cls,
        *,
        kubeconfig: Path | None = None,
        context: str | None = None,
        user_agent: str,
        on_request: OnRequest | None = None,
    ) -> KubernetesClient:
        """A kubeconfig that is named (here or by $KUBECONFIG) wins, then the service account of
        the pod, then ~/.kube/config. Raises ``access.NoCluster``."""
        access = await access_from(os.environ, kubeconfig=kubeconfig, context=context)
        return cls(access, user_agent=user_agent, on_request=on_request)

    async def __aenter__(self) -> KubernetesClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()
        await self._watches.close()

    # --- requests -----------------------------------------------------------------------------

    async def get(self, path: str, **params: str | int) -> Json:
        return await self.request("GET", path, params=params)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, str | int] | None = None,
        content_type: str = "application/json",
        accept: str | None = None,
        timeout_s: float = 30.0,
    ) -> Json:
        """One request and its decoded answer ({} if there is none). ``timeout_s`` bounds each
        attempt, waiting for a free connection included."""
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Accept": accept or "application/json"}
        if data is not None:
            headers["Content-Type"] = content_type
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        for attempt in range(WAIT_RETRIES + 1):
            async with self._answer(
                self._session, method, path, params or {}, headers, data, timeout
            ) as answer:
                content = await answer.read()
            wait_s = _wait_s(answer)
            if wait_s is None or attempt == WAIT_RETRIES:
                break
            await asyncio.sleep(wait_s)
        for header in answer.headers.getall("Warning", ()):
            self._warn(header)
        if answer.status >= 400:
            raise _error(answer.status, answer.reason, content)
        if not content:
            return {}
        try:
            decoded: Json = msgspec.json.decode(content)
        except msgspec.DecodeError as error:
            raise ApiError(answer.status, "InvalidAnswer", f"{method} {path}: {error}") from error
        return decoded

    @asynccontextmanager
    async def _answer(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        params: Mapping[str, str | int],
        headers: Mapping[str, str],
        data: bytes | None,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """The answer's head; its body is to be read inside. Asks once more after a 401."""
        access = self._access
        url = URL(access.url + path)
        began = time.monotonic()
        status = 0
        try:
            for attempt in (1, 2):
                authorization = access.authorization()
                async with session.request(
                    method,
                    url,
                    params=params,
                    data=data,
                    headers={**headers, "Authorization": authorization}
                    if authorization
                    else headers,
                    timeout=timeout,
                    ssl=access.tls or True,
                    server_hostname=access.server_hostname,
                    proxy=access.proxy,
                    allow_redirects=False,
                ) as answer:
                    if answer.status == 401 and attempt == 1 and await self._renewed(authorization):
                        continue
                    status = answer.status
                    if session is self._watches:
                        self._told(method, path, status, began)
                    yield answer
                break
        except TimeoutError as error:
            message = f"{access.url} did not answer {method} {path} in time"
            raise ApiUnreachable(message, "Timeout") from error
        except aiohttp.ClientError as error:
            raise ApiUnreachable(
                f"{access.url}: {method} {path}: {error or type(error)}"
            ) from error
        finally:
            if session is not self._watches or not status:
                self._told(method, path, status, began)

    async def _check_fence(
        self, _session: object, _context: object, sent: aiohttp.TraceRequestHeadersSentParams
    ) -> None:
        if self.fence is not None and sent.method not in ("GET", "HEAD"):
            prefix = URL(self._access.url).path.rstrip("/")
            self.fence(namespace_in(sent.url.path.removeprefix(prefix)))

    async def _renewed(self, used: str | None) -> bool:
        """Whether there are other credentials than those that ``used`` was made of."""
        async with self._renewing:
            if self._access.authorization() == used:
                try:
                    await self._access.renew()
                except Exception as error:  # of a plugin, or of a library that runs it
                    log.error("can't renew the credentials for %s: %s", self._access.url, error)
                    return False
            return True

    def _told(self, method: str, path: str, status: int, began: float) -> None:
        if self._on_request is not None:
            self._on_request(method, resource_in(path), status, time.monotonic() - began)

    def _warn(self, header: str) -> None:
        found = _WARNING.fullmatch(header)
        text = found[1].replace('\\"', '"') if found else header
        if text not in self._warned and len(self._warned) < 1000:
            self._warned.add(text)
            log.warning("the API server warns: %s", text)

    # --- writes -------------------------------------------------------------------------------

    async def apply(
        self,
        manifest: Mapping[str, Any],
        *,
        field_manager: str,
        force: bool = True,
        dry_run: bool = False,
        subresource: str | None = None,
    ) -> Json:
        """Server-side apply: own exactly the fields of ``manifest``; the object as it then is."""
        path = resources.of(manifest).path_of(manifest, subresource)
        params = {"fieldManager": field_manager, "force": "true" if force else "false"}
        if dry_run:
            params["dryRun"] = "All"
        return await self.request("PATCH", path, body=manifest, params=params, content_type=APPLY)

    async def create(
        self,
        manifest: Mapping[str, Any],
        *,
        field_manager: str | None = None,
        dry_run: bool = False,
    ) -> Json:
        """Create the object; 409 AlreadyExists if there is one of this name."""
        path = resources.of(manifest).path(manifest["metadata"].get("namespace"))
        params = {"fieldManager": field_manager} if field_manager else {}
        if dry_run:
            params["dryRun"] = "All"
        return await self.request("POST", path, body=manifest, params=params)

    async def replace(
        self, path: str, manifest: Mapping[str, Any], *, field_manager: str | None = None
    ) -> Json:
        """Write the whole object; 409 Conflict if its resourceVersion is not the current one."""
        params = {"fieldManager": field_manager} if field_manager else {}
        return await self.request("PUT", path, body=manifest, params=params)

    async def delete(
        self,
        path: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        propagation: str | None = None,
        grace_s: int | None = None,
    ) -> Json:
        """Delete the object, if it is (still) the one with ``uid`` and ``resource_version``; 409
        Conflict otherwise. ``propagation``: Background, Foreground or Orphan."""
        options: Json = {"apiVersion": "v1", "kind": "DeleteOptions"}
        conditions = {"uid": uid, "resourceVersion": resource_version}
        if given := {key: value for key, value in conditions.items() if value is not None}:
            options["preconditions"] = given
        if propagation is not None:
            options["propagationPolicy"] = propagation
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        return await self.request("DELETE", path, body=options)

    async def merge_patch(
        self, path: str, body: Mapping[str, Any], *, field_manager: str | None = None
    ) -> Json:
        """JSON merge patch (RFC 7386): null removes."""
        params = {"fieldManager": field_manager} if field_manager else {}
        return await self.request("PATCH", path, body=body, params=params, content_type=MERGE_PATCH)

    async def json_patch(self, path: str, operations: Sequence[Mapping[str, Any]]) -> Json:
        """JSON patch (RFC 6902), all or nothing; its ``test`` operations are preconditions."""
        return await self.request("PATCH", path, body=operations, content_type=JSON_PATCH)

    # --- watches ------------------------------------------------------------------------------

    async def watch(
        self,
        path: str,
        params: Mapping[str, str | int],
        *,
        timeout_s: float,
        on_open: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[Json]:
        """Watch events ``{"type", "object"}`` from now until the server ends the watch.

        ``params`` as the API has them; `watch=true` is added. Nothing heard for ``timeout_s``
        seconds counts as a lost connection. ``on_open`` is called when the server has agreed, which
        may be long before the first event. Close the iterator (``aclosing``) to end early.
        """
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=timeout_s
        )
        params = {"watch": "true", **params}
        headers = {"Accept": "application/json"}
        async with self._answer(
            self._watches, "GET", path, params, headers, None, timeout
        ) as answer:
            if answer.status >= 400:
                raise _error(answer.status, answer.reason, await answer.read())
            on_open()
            rest: list[bytes] = []  # of a line whose end has not come
            async for chunk in answer.content.iter_any():
                *lines, tail = chunk.split(b"\n")
                for line in lines:
                    if rest:
                        rest.append(line)
                        line = b"".join(rest)
                        rest.clear()
                    if line:
                        yield _event(line)
                if tail:
                    rest.append(tail)


_WARNING = re.compile(r'\d{3} \S+ "((?:[^"\\]|\\.)*)".*')
"""`299 - "text"` (RFC 7234, 5.5)."""


def _event(line: bytes) -> Json:
    try:
        event: Json = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise ApiUnreachable(f"a watch event is no JSON: {error}") from error
    return event


def _error(status: int, phrase: str | None, content: bytes) -> ApiError:
    try:
        body = msgspec.json.decode(content)
    except msgspec.DecodeError:
        body = None
    if not isinstance(body, dict) or body.get("kind") != "Status":
        text = content.decode(errors="replace").strip()[:500]  # of a proxy between, say
        return ApiError(status, phrase or "Unknown", text or phrase or "no explanation")
    return ApiError(
        status, body.get("reason") or phrase or "Unknown", body.get("message") or "", body
    )


def error_of(status: Json) -> ApiError:
    """The error that a Status object, as a watch's ERROR event carries it, stands for."""
    return ApiError(
        int(status.get("code") or 500),
        status.get("reason") or "Unknown",
        status.get("message") or "",
        status,
    )


def _wait_s(answer: aiohttp.ClientResponse) -> float | None:
    """Seconds after which the server wants to be asked again; None if it does not say so."""
    after = answer.headers.get("Retry-After", "")
    if answer.status != 429 and not (answer.status >= 500 and after):
        return None
    return min(float(after) if after.isdigit() else 1.0, WAIT_LIMIT_S)


def namespace_in(path: str) -> str:
    """The namespace of what a path addresses; "" if that is in none."""
    parts = _parts(path)
    return parts[1] if len(parts) > 1 and parts[0] == "namespaces" else ""


def resource_in(path: str) -> str:
    """What a path addresses, for metrics: `pods`, `deployments/status`; bounded in number."""
    parts = _parts(path)
    if len(parts) > 2 and parts[0] == "namespaces":
        parts = parts[2:]
    if not parts:
        return "other"
    return f"{parts[0]}/{parts[2]}" if len(parts) > 2 else parts[0]


def _parts(path: str) -> list[str]:
    """A path's steps below the API's group and version."""
    parts = path.strip("/").split("/")
    return parts[2:] if parts[0] == "api" else parts[3:] if parts[0] == "apis" else []
