"""The HTTP API, in the shapes of vLLM's OpenAI server.

Routes, bodies, errors and ids are those of vLLM 0.32. The streamed answers are written straight to
ASGI: with hundreds of tokens a second in several engines on few cores, the layers in between would
cost more than the simulation itself.
"""

import asyncio
import base64
import hashlib
import importlib
import inspect
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo_workers.sim import completions, events, metrics, responses
from dynamo_workers.sim.adapters import Adapter
from dynamo_workers.sim.answers import DIMENSIONS, AnswerBook
from dynamo_workers.sim.chat import Renderer
from dynamo_workers.sim.engine import Engine
from dynamo_workers.sim.errors import RequestError
from dynamo_workers.sim.generation import Generation
from dynamo_workers.sim.parameters import Parameters, boolean, integer, read

VERSION = "0.32.0"
"""The version of vLLM that is imitated; /version answers it."""

FINGERPRINT = f"sim-{VERSION}"
FIXED_TIME = 1_700_000_000
"""`created` in deterministic mode."""

LARGE_TEXT = 32_768
"""Characters from which on a prompt is tokenized in a thread."""

Handler = Callable[[Request, dict[str, Any]], Coroutine[Any, Any, ASGIApp]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the API presents the engine."""

    names: tuple[str, ...]
    """Served model names; the first one stands in answers."""
    root: str
    """Where the model came from (`root` in /v1/models)."""
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters, which requests name as they do a model."""
    deterministic: bool = False
    """Ids and times come from the request, each token is an event: same request, same bytes."""
    prompt_tokens_details: bool = False
    """Whether usage tells how many prompt tokens were cached."""
    request_id_headers: bool = False
    """Whether X-Request-Id is echoed."""
    dev_mode: bool = False
    """Whether /reset_prefix_cache exists."""


class Api:
    """The handlers; `app` is the application to serve."""

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        book: AnswerBook,
        settings: Settings,
        kv_events: events.KVEventsConfig | None = None,
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._book = book
        self._settings = settings
        self._kv_events = kv_events
        self._collector = metrics.EngineCollector(
            settings.names[0],
            engine.scheduler,
            engine.metrics,
            engine.connector.counts if engine.connector is not None else None,
        )
        self._adapters = {adapter.name: adapter for adapter in settings.adapters}
        self._vocabulary = renderer.tokenizer.get_vocab_size()
        self._in_flight = 0
        self._started = int(time.time())
        self.app = Starlette(
            routes=self._routes(),
            lifespan=self._lifespan(),
            exception_handlers={HTTPException: _detail},
        )

    def _routes(self) -> list[Route]:
        routes = [
            Route("/health", self._ok, methods=["GET"]),
            Route("/ping", self._ok, methods=["GET", "POST"]),
            Route("/version", self._version, methods=["GET"]),
            Route("/load", self._load, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/kv_event_sources", self._kv_event_sources, methods=["GET"]),
            Route("/tokenize", self._post(self._tokenize), methods=["POST"]),
            Route("/detokenize", self._post(self._detokenize), methods=["POST"]),
            Route("/v1/chat/completions", self._post(self._chat), methods=["POST"]),
            Route("/v1/completions", self._post(self._completions), methods=["POST"]),
            Route("/v1/embeddings", self._post(self._embeddings), methods=["POST"]),
            Route("/v1/responses", self._post(self._responses), methods=["POST"]),
        ]
        if self._settings.dev_mode:
            routes.append(Route("/reset_prefix_cache", self._reset, methods=["POST"]))
        return routes

    def _lifespan(self) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            await self._engine.start()
            try:
                yield
            finally:
                await self._engine.stop()

        return lifespan

    # --- without a body -------------------------------------------------------------------------

    async def _ok(self, _request: Request) -> Response:
        return Response()

    async def _version(self, _request: Request) -> Response:
        return _json({"version": VERSION})

    async def _load(self, _request: Request) -> Response:
        return _json({"server_load": self._in_flight})

    async def _metrics(self, _request: Request) -> Response:
        body = metrics.exposition(self._collector)
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _kv_event_sources(self, _request: Request) -> Response:
        return _json(events.sources(self._kv_events))

    async def _models(self, _request: Request) -> Response:
        names, root = self._settings.names, self._settings.root
        longest = self._engine.scheduler.limits.max_model_len
        models = [self._card(name, root, None, longest) for name in names]
        models += [
            self._card(adapter.name, adapter.path, names[0], None)
            for adapter in self._settings.adapters
        ]
        return _json({"object": "list", "data": models})

    def _card(
        self, name: str, root: str, parent: str | None, longest: int | None
    ) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "vllm",
            "root": root,
            "parent": parent,
            "max_model_len": longest,
            "permission": [],
        }

    async def _reset(self, _request: Request) -> Response:
        return _json({"success": self._engine.reset_prefix_cache()})

    # --- with a JSON body -----------------------------------------------------------------------

    def _post(self, handler: Handler) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def endpoint(request: Request) -> Response:
            answer: ASGIApp
            try:
                raw = await request.body()
                request.state.request_id = self._request_id(request, raw)
                answer = await handler(request, _object(raw))
            except RequestError as error:
                answer = _json(error.body(), error.status)
            except ClientDisconnect:
                answer = Response(status_code=499)
                return _Passed(answer)
            if self._settings.request_id_headers:
                answer = _with_request_id(answer, request.state.request_id)
            return _Passed(answer)

        return endpoint

    async def _tokenize(self, _request: Request, body: dict[str, Any]) -> ASGIApp:
        self._check_model(body)
        if "messages" in body:
            special = boolean(body, "add_special_tokens")
            tokens = await self._encode(self._renderer.render(body), special=special)
        elif isinstance(body.get("prompt"), str):
            special = body.get("add_special_tokens", True) is not False
            tokens = await self._encode(body["prompt"], special=special)
        else:
            raise RequestError("prompt must be a string, or messages a list.", param="prompt")
        strings = None
        if boolean(body, "return_token_strs"):
            tokenizer = self._renderer.tokenizer
            strings = [tokenizer.id_to_token(token) for token in tokens]
        return _json(
            {
                "count": len(tokens),
                "max_model_len": self._engine.scheduler.limits.max_model_len,
                "tokens": tokens,
                "token_strs": strings,
            }
        )

    async def _detokenize(self, _request: Request, body: dict[str, Any]) -> ASGIApp:
        self._check_model(body)
        return _json({"prompt": self._renderer.decode(self._ids(body.get("tokens"), "tokens"))})

    async def _chat(self, request: Request, body: dict[str, Any]) -> ASGIApp:
        model = self._check_model(body)
        if "messages" not in body:
            raise RequestError("Field required", param="messages")
        parameters = read(
            body, limits=("max_completion_tokens", "max_tokens"), default_max_tokens=None
        )
        prompt = await self._encode(
            self._renderer.render(body), special=boolean(body, "add_special_tokens")
        )
        envelope = self._envelope(request, body, "chatcmpl", model)
        generation = await self._start([prompt], parameters, body, envelope)
        return self._answer(generation, completions.Chat(envelope, parameters), parameters)

    async def _completions(self, request: Request, body: dict[str, Any]) -> ASGIApp:
        model = self._check_model(body)
        parameters = read(body, limits=("max_tokens",), default_max_tokens=16)
        prompts = await self._prompts(
            body.get("prompt"), special=body.get("add_special_tokens", True) is not False
        )
        echo = boolean(body, "echo")
        if echo and parameters.stream:
            raise RequestError("The simulated engine does not stream an echo.", param="echo")
        envelope = self._envelope(request, body, "cmpl", model)
        generation = await self._start(prompts, parameters, body, envelope)
        shape = completions.Text(
            envelope,
            parameters,
            [self._renderer.decode(prompt, skip_special=True) for prompt in prompts]
            if echo
            else None,
        )
        return self._answer(generation, shape, parameters)

    async def _responses(self, request: Request, body: dict[str, Any]) -> ASGIApp:
        model = self._check_model(body)
        chat = responses.chat_body(body)
        parameters = read(chat, limits=("max_output_tokens",), default_max_tokens=None)
        # Unlike for chats, vLLM lets the tokenizer add its special tokens here.
        prompt = await self._encode(self._renderer.render(chat), special=True)
        generation = Generation.start(
            self._engine, self._book, [prompt], parameters, adapter=self._adapters.get(model)
        )
        shape = responses.Responses(self._envelope(request, body, "resp", model), body)
        return self._answer(generation, shape, parameters)

    async def _embeddings(self, request: Request, body: dict[str, Any]) -> ASGIApp:
        model = self._check_model(body)
        dimensions = integer(body, "dimensions")
        if dimensions is not None and not 1 <= dimensions <= 4096:
            raise RequestError(
                "dimensions must be from 1 to 4096.", param="dimensions", value=dimensions
            )
        encoding = body.get("encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise RequestError(
                "encoding_format must be float or base64.", param="encoding_format", value=encoding
            )
        if "messages" in body:
            # Unlike for chats, there is no answer to begin.
            text = self._renderer.render({"add_generation_prompt": False, **body})
            prompts = [await self._encode(text, special=boolean(body, "add_special_tokens"))]
        else:
            special = body.get("add_special_tokens", True) is not False
            prompts = await self._prompts(body.get("input"), special=special, name="input")
        adapter = self._adapters.get(model)
        generation = Generation.embed(self._engine, prompts, adapter)
        own = "" if adapter is None else adapter.name
        vectors = [
            self._book.embedding(prompt, dimensions or DIMENSIONS, own) for prompt in prompts
        ]
        envelope = self._envelope(request, body, "embd", model)
        count = sum(len(prompt) for prompt in prompts)
        answer = {
            "id": envelope.id,
            "object": "list",
            "created": envelope.created,
            "model": envelope.model,
            "data": [
                {
                    "index": index,
                    "object": "embedding",
                    "embedding": vector if encoding == "float" else _base64(vector),
                }
                for index, vector in enumerate(vectors)
            ],
            "usage": {
                "prompt_tokens": count,
                "total_tokens": count,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
            },
        }
        return _Watched(self, generation, _Whole(lambda: answer))

    # --- shared ---------------------------------------------------------------------------------

    async def _start(
        self,
        prompts: list[list[int]],
        parameters: Parameters,
        body: dict[str, Any],
        envelope: completions.Envelope,
    ) -> Generation:
        """Queues a generation, its prompt's KV from or for another engine if the body says so."""
        params = body.get("kv_transfer_params")
        connector = self._engine.connector
        adapter = self._adapters.get(envelope.model)
        external, keep_as = 0, ""
        if params is not None and not isinstance(params, dict):
            raise RequestError("kv_transfer_params must be an object.", param="kv_transfer_params")
        if params and connector is not None:
            if len(prompts) != 1 or parameters.n != 1:
                raise RequestError(
                    "A KV transfer takes one prompt and one answer.", param="kv_transfer_params"
                )
            if boolean(params, "do_remote_prefill"):
                external = await connector.fetch(params, prompts[0], adapter)
            if boolean(params, "do_remote_decode"):
                keep_as = envelope.id
        return Generation.start(
            self._engine,
            self._book,
            prompts,
            parameters,
            adapter=adapter,
            external=external,
            keep_as=keep_as,
        )

    def _answer(
        self, generation: Generation, shape: completions.Shape, parameters: Parameters
    ) -> ASGIApp:
        if parameters.stream:
            return _Watched(self, generation, _EventStream(shape, self._settings.deterministic))
        return _Watched(self, generation, _Whole(lambda: shape.whole(generation)))

    def _envelope(
        self, request: Request, body: dict[str, Any], prefix: str, model: str
    ) -> completions.Envelope:
        own = body.get("request_id")
        name = own if isinstance(own, str) and own else request.state.request_id
        return completions.Envelope(
            id=f"{prefix}-{name}" if prefix != "resp" else f"resp_{name}",
            created=FIXED_TIME if self._settings.deterministic else int(time.time()),
            model=model,
            fingerprint=FINGERPRINT,
            details=self._settings.prompt_tokens_details,
        )

    def _request_id(self, request: Request, body: bytes) -> str:
        given = request.headers.get("x-request-id")
        if given:
            return given
        if self._settings.deterministic:
            return hashlib.blake2b(body, digest_size=8).hexdigest()
        return secrets.token_hex(8)

    def _check_model(self, body: dict[str, Any]) -> str:
        """The name to answer with; a request may leave the model out, as with vLLM."""
        names = self._settings.names
        given = body.get("model")
        if given is None or given in (*names, *self._adapters):
            return given or names[0]
        raise RequestError(
            f"The model `{given}` does not exist. Valid aliases: {', '.join(names)}.",
            status=404,
            param="model",
        )

    async def _encode(self, text: str, *, special: bool) -> list[int]:
        if len(text) < LARGE_TEXT:
            return self._renderer.encode(text, special=special)
        return await asyncio.to_thread(self._renderer.encode, text, special=special)

    async def _prompts(self, given: Any, *, special: bool, name: str = "prompt") -> list[list[int]]:
        """A text, a list of texts, token ids, or a list of lists of token ids."""
        if given is None or given == "":
            raise RequestError(
                f"Either {name} or prompt_embeds must be provided and non-empty.", param=name
            )
        if given == []:
            raise RequestError("You must pass at least one prompt")
        if isinstance(given, str):
            return [await self._encode(given, special=special)]
        if isinstance(given, list) and all(isinstance(item, str) for item in given):
            return [await self._encode(item, special=special) for item in given]
        if isinstance(given, list) and all(isinstance(item, list) for item in given):
            return [self._ids(item, name) for item in given]
        return [self._ids(given, name)]

    def _ids(self, given: Any, name: str) -> list[int]:
        if not isinstance(given, list) or not all(type(item) is int for item in given):
            raise RequestError(
                f"{name} must be a string, a list of strings, or token ids.", param=name
            )
        for item in given:
            if not 0 <= item < self._vocabulary:
                raise RequestError(f"Token id {item} is out of vocabulary")
        return given

    def _entered(self) -> None:
        self._in_flight += 1

    def _left(self) -> None:
        self._in_flight -= 1


class _Passed(Response):
    """Starlette wants a Response; this one is whatever ASGI application it is given."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _Whole:
    """Sends one JSON body when the generation has ended."""

    def __init__(self, body: Callable[[], dict[str, Any]]) -> None:
        self._body = body

    async def __call__(
        self, generation: Generation, scope: Scope, receive: Receive, send: Send
    ) -> None:
        await generation.wait()
        if not any(sequence.aborted for sequence in generation.sequences):
            await _json(self._body())(scope, receive, send)


class _EventStream:
    """Sends server-sent events as tokens come."""

    def __init__(self, shape: completions.Shape, one_by_one: bool) -> None:
        self._shape = shape
        self._one_by_one = one_by_one

    async def __call__(
        self, generation: Generation, _scope: Scope, _receive: Receive, send: Send
    ) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
            }
        )
        begun = self._shape.begin(generation)
        sent = [0] * len(generation.sequences)
        ended = False
        while not ended:
            # Read before the tokens: what comes in between is sent in the next turn.
            ended = generation.finished
            if any(sequence.aborted for sequence in generation.sequences):
                return
            chunk = bytearray()
            for index, sequence in enumerate(generation.sequences):
                start, end = sent[index], sequence.produced
                if start == end:
                    continue
                if start == 0:
                    chunk += begun[index]
                step = 1 if self._one_by_one else end - start
                for first in range(start, end, step):
                    chunk += self._shape.tokens(generation, index, first, first + step)
                sent[index] = end
            if chunk and not ended:
                await send({"type": "http.response.body", "body": bytes(chunk), "more_body": True})
            if not ended:
                await generation.changed()
        chunk += self._shape.end(generation)
        await send({"type": "http.response.body", "body": bytes(chunk), "more_body": False})


class _Watched:
    """Runs an answer while watching the client: when it leaves, the generation is aborted."""

    def __init__(self, api: Api, generation: Generation, answer: "_Whole | _EventStream") -> None:
        self._api = api
        self._generation = generation
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._api._entered()
        watch = asyncio.get_running_loop().create_task(self._watch(receive))
        try:
            await self._answer(self._generation, scope, receive, send)
        finally:
            watch.cancel()
            self._generation.abort()  # nothing, where it has ended
            self._api._left()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.abort()


def _with_request_id(app: ASGIApp, request_id: str) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode("latin-1")),
                ]
            await send(message)

        await app(scope, receive, sending)

    return wrapped


def add_middleware(app: Starlette, name: str) -> None:
    """`--middleware module.Name`, as vLLM: an ASGI class, or a function(request, call_next).

    Raises ImportError or AttributeError where there is no such thing, TypeError for other things.
    """
    module, _dot, attribute = name.rpartition(".")
    if not module:
        raise ImportError(f"--middleware {name}: module.Name is expected")
    imported: Any = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(imported):
        app.add_middleware(cast(Any, imported))
    elif inspect.iscoroutinefunction(imported):
        app.add_middleware(BaseHTTPMiddleware, dispatch=imported)
    else:
        raise TypeError(f"--middleware {name}: a class or a coroutine function is expected")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise RequestError(f"JSON decode error: {error}", param="body") from error
    if not isinstance(body, dict):
        raise RequestError("The body must be a JSON object.", param="body")
    return body


async def _detail(_request: Request, error: Exception) -> Response:
    """404 and 405 of paths, in the form that FastAPI (and so vLLM) gives them."""
    assert isinstance(error, HTTPException)
    answer = _json({"detail": error.detail}, error.status_code)
    answer.headers.update(error.headers or {})
    return answer


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _base64(vector: list[float]) -> str:
    return base64.b64encode(array("f", vector).tobytes()).decode()
