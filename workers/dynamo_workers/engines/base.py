"""What the launcher needs of an engine, and what engines with vLLM's flags have in common.

An engine is a program: the launcher gives it an address for its HTTP server, sockets for its
events and our middleware for its load, and then asks it over HTTP what it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import msgspec
from dynamo_kv_router import engine_metrics
from dynamo_runtime.prefill_grant import BadSecret, read_secret

from dynamo_workers import model_files
from dynamo_workers.engine_side import FOLDER, MIDDLEWARE, PREFILL_MIDDLEWARE, SOCKET_VARIABLE
from dynamo_workers.engines.arguments import Arguments, BadArguments

log = logging.getLogger(__name__)

# Flags that change how a chat becomes tokens. A picker that can't follow one must not tokenize.
RENDERING_FLAGS = (
    "--chat-template-content-format",
    "--default-chat-template-kwargs",
    "--response-role",
    "--tokenizer-mode",
    "--tokenizer-revision",
)
RENDERING_SWITCHES = (
    "--trust-request-chat-template",
    "--exclude-tools-when-tool-choice-none",
    "--trust-remote-code",
    "--skip-tokenizer-init",
)

TRANSFER_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
"""Role of a worker -> role in vLLM's --kv-transfer-config."""
SIDE_CHANNEL_VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_HOST"

_JINJA = ("{", "}", "\n")  # what tells a template from the path of one, as vLLM decides it


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine is to serve, and the sockets it is to use."""

    host: str  # its HTTP server's bind address
    port: int
    events: str  # ZeroMQ address it binds for KV events
    replay: str  # ZeroMQ address it binds for replay of events
    reports: str  # ZeroMQ address of the launcher, to which the middleware reports

    @property
    def url(self) -> str:
        """Where the launcher reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Models:
    """The names an engine answers to."""

    names: tuple[str, ...]  # the main one first; adapters included
    adapters: tuple[str, ...] = ()  # those that are LoRA adapters


@dataclass(frozen=True, slots=True)
class Description:
    """What a running engine says it is. Counts are 0 where it does not say."""

    models: Models
    block_size: int
    total_blocks: int
    max_model_len: int
    max_num_batched_tokens: int
    files: model_files.ServedFiles = field(default_factory=model_files.ServedFiles)
    tokenizer_settings: dict[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """One kind of engine, set up from a command line."""

    runtime: str  # "vllm" | "sim"

    def argv(self, place: Place) -> list[str]: ...

    def env(self, place: Place) -> dict[str, str]:
        """The whole environment of the process."""

    async def describe(self, client: aiohttp.ClientSession, place: Place) -> Description:
        """Ask a healthy engine what it is. Raises ``EngineUnclear``."""

    async def models(self, client: aiohttp.ClientSession, place: Place) -> Models:
        """The names it answers to at this moment: adapters come and go."""


class EngineUnclear(Exception):
    """A healthy engine does not say what a picker must know of it."""


class Server:
    """An OpenAI server with vLLM's flags. Raises ``BadArguments`` for a line that can't work."""

    runtime = ""

    def __init__(self, arguments: Arguments, env: Mapping[str, str], port: int) -> None:
        self.arguments = arguments
        self._env = dict(env)
        self._refuse(port)
        self.model = arguments.value("--model")
        self.role = env.get("DYN_COMPONENT_TYPE", "")
        self._events = self._take_events_config()
        self._transfer = self._take_transfer_config() if self.role in TRANSFER_ROLES else None

    def _refuse(self, port: int) -> None:
        """Refuse what would take the engine away from the launcher."""
        arguments = self.arguments
        for flag, wanted in (("--host", ""), ("--port", str(port))):
            given = arguments.remove(flag)
            if given and wanted and given[0] != wanted:
                raise BadArguments(
                    f"{flag} {given[0]}: the pod decides the address (here port {wanted}); "
                    f"remove {flag}, or set DYN_HTTP_PORT={given[0]} to move the engine"
                )
            if given and not wanted:
                log.info("%s %s is ignored: DYN_HTTP_HOST decides it", flag, given[0])
        for flag, instead in (
            ("--uds", "pickers reach a worker by address; remove it"),
            ("--ssl-keyfile", "TLS ends at the proxy in front; remove it"),
            ("--headless", "run one worker a pod, each with its own server; remove it"),
            ("--grpc", "pickers send HTTP; remove it"),
        ):
            if arguments.has(flag):
                raise BadArguments(f"{flag} can't be used in a worker: {instead}")
        ranks = arguments.number("--data-parallel-size") or arguments.number("-dp")
        if ranks > 1:
            raise BadArguments(
                f"--data-parallel-size {ranks}: one worker is one rank, because events over ipc "
                f"have room for one; use {ranks} replicas instead"
            )
        if arguments.has("--disable-log-stats"):
            raise BadArguments(
                "--disable-log-stats removes every metric of the engine, which pickers, planner "
                "and readiness need; remove it"
            )

    def _take_events_config(self) -> dict[str, Any]:
        """The user's ``--kv-events-config``, less what the launcher decides."""
        config = self._take_json("--kv-events-config")
        ours = ("enable_kv_cache_events", "publisher", "endpoint", "replay_endpoint")
        dropped = {name: config.pop(name) for name in ours if name in config}
        if dropped:
            log.warning(
                "--kv-events-config: the launcher sets %s itself; pickers read the worker's own "
                "event stream, not the engine's",
                ", ".join(f"{name} (was {value!r})" for name, value in dropped.items()),
            )
        return config

    def _take_transfer_config(self) -> dict[str, Any]:
        """``--kv-transfer-config`` of a prefill or decode worker, completed.

        The connector is NIXL unless the user chose one. A decode worker computes a prompt whose
        transfer fails; by vLLM's default it would answer the client with 500.
        """
        try:
            secret = read_secret(self._env)
        except BadSecret as error:
            raise BadArguments(str(error)) from None
        if secret is None:
            log.warning(
                "no DYN_PD_SECRET or DYN_PD_SECRET_FILE: no request that asks for a prefill worker "
                "is believed, and each worker computes its own prompts"
            )
        return {
            "kv_connector": "NixlConnector",
            "kv_role": TRANSFER_ROLES[self.role],
            **({"kv_load_failure_policy": "recompute"} if self.role == "decode" else {}),
            **self._take_json("--kv-transfer-config"),
        }

    def _take_json(self, flag: str) -> dict[str, Any]:
        """The JSON object given to ``flag``, dotted forms included; the flag is removed."""
        given = self.arguments.remove(flag)
        config: dict[str, Any] = {}
        if given:
            try:
                config = msgspec.json.decode(given[0], type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise BadArguments(f"{flag}: {given[0]!r} is no JSON object: {error}") from None
        for dotted in self.arguments.flags_under(flag):
            name = dotted.rpartition(".")[2].replace("-", "_")
            value = self.arguments.remove(dotted)[0]
            try:
                config[name] = msgspec.json.decode(value)
            except msgspec.DecodeError:
                config[name] = value
        return config

    def _transfer_flags(self) -> list[str]:
        if self._transfer is None:
            return []
        return [
            *("--kv-transfer-config", msgspec.json.encode(self._transfer).decode()),
            *("--middleware", PREFILL_MIDDLEWARE),
        ]

    def _server_flags(self, place: Place) -> list[str]:
        config = self._events | {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": place.events,
            "replay_endpoint": place.replay,
        }
        # Usage then tells cached tokens, which pickers compare with what they expected.
        details = "--enable-prompt-tokens-details"
        return [
            *self.arguments.line,
            *([] if self.arguments.has(details) else [details]),
            *("--host", place.host),
            *("--port", str(place.port)),
            *("--kv-events-config", msgspec.json.encode(config).decode()),
            *self._transfer_flags(),
            *("--middleware", MIDDLEWARE),  # last = outermost: it sees every answer as sent
        ]

    def _server_env(self, place: Place) -> dict[str, str]:
        path = self._env.get("PYTHONPATH", "")
        defaults = {}
        if self._transfer is not None:  # by default the engine would offer its blocks at localhost
            defaults[SIDE_CHANNEL_VARIABLE] = self._env.get("POD_IP") or place.host
        return (
            defaults
            | self._env
            | {
                "PYTHONPATH": f"{FOLDER}{os.pathsep}{path}" if path else str(FOLDER),
                SOCKET_VARIABLE: place.reports,
            }
        )

    # asking the running engine

    @property
    def _headers(self) -> dict[str, str]:
        key = self.arguments.value("--api-key") or self._env.get("VLLM_API_KEY", "")
        return {"authorization": f"Bearer {key}"} if key else {}

    async def _model_cards(
        self, client: aiohttp.ClientSession, place: Place
    ) -> list[dict[str, Any]]:
        async with client.get(f"{place.url}/v1/models", headers=self._headers) as response:
            if response.status != 200:
                raise EngineUnclear(f"/v1/models answered {response.status}")
            cards = msgspec.json.decode(await response.read()).get("data") or []
        if not cards:
            raise EngineUnclear("/v1/models lists no model")
        return cards

    async def models(self, client: aiohttp.ClientSession, place: Place) -> Models:
        return _models(await self._model_cards(client, place))

    async def describe(self, client: aiohttp.ClientSession, place: Place) -> Description:
        cards = await self._model_cards(client, place)
        async with client.get(f"{place.url}/metrics", headers=self._headers) as response:
            cache = engine_metrics.cache_config(await response.text())
        block_size = _whole(cache.get("block_size")) or self.arguments.number("--block-size")
        if not block_size:
            raise EngineUnclear(
                f"/metrics has no block_size in {engine_metrics.CACHE_CONFIG}; give --block-size"
            )
        root = str(cards[0].get("root") or self.model)
        files, settings = await asyncio.to_thread(self.tokenizer, root)
        return Description(
            models=_models(cards),
            block_size=block_size,
            total_blocks=_whole(cache.get("num_gpu_blocks")),
            max_model_len=_whole(cards[0].get("max_model_len")),
            max_num_batched_tokens=self.arguments.number("--max-num-batched-tokens"),
            files=files,
            tokenizer_settings=settings,
        )

    def tokenizer(self, root: str) -> tuple[model_files.ServedFiles, dict[str, str]]:
        """The files a picker may have, and what changes rendering beside them."""
        arguments = self.arguments
        settings = {
            flag.removeprefix("--").replace("-", "_"): arguments.value(flag)
            for flag in RENDERING_FLAGS
            if arguments.value(flag)
        }
        settings |= {
            flag.removeprefix("--").replace("-", "_"): "true"
            for flag in RENDERING_SWITCHES
            if arguments.has(flag)
        }
        if arguments.has("--skip-tokenizer-init"):
            return model_files.ServedFiles(reason="--skip-tokenizer-init: it has none"), settings
        template = arguments.value("--chat-template")
        if template:
            settings["chat_template"] = model_files.CHAT_TEMPLATE
            if not Path(template).is_file() and not any(mark in template for mark in _JINJA):
                reason = f"--chat-template {template} is a template of the engine's own"
                return model_files.ServedFiles(reason=reason), settings
        name = arguments.value("--tokenizer") or root
        revision = arguments.value("--tokenizer-revision") or (
            "" if arguments.has("--tokenizer") else arguments.value("--revision")
        )
        folder = self._folder(name, revision)
        missing = f"{name} is neither a folder nor in Hugging Face's cache"
        return model_files.collect(folder, chat_template=template, missing=missing), settings

    def _folder(self, name: str, revision: str) -> Path | None:
        cache = self.arguments.value("--download-dir")
        return model_files.find_model(name, revision, env=self._env, cache=cache)


def _models(cards: list[dict[str, Any]]) -> Models:
    """An adapter's card names the base model as its parent."""
    return Models(
        names=tuple(str(card["id"]) for card in cards),
        adapters=tuple(str(card["id"]) for card in cards if card.get("parent")),
    )


def _whole(value: object) -> int:
    """A count from a label or a JSON field; 0 for anything else (``None``, ``"None"``)."""
    text = str(value)
    return int(text) if text.isdecimal() else 0
