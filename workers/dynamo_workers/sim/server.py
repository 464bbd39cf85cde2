"""The command line of the simulated engine, and the process behind it.

The flags are vLLM's where vLLM has them, so that one launcher and one manifest fit both engines.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import cast

import uvicorn
from dynamo_runtime import lifecycle, logs, timing_profile

from dynamo_workers.sim.adapters import parse as parse_adapters
from dynamo_workers.sim.answers import AnswerBook
from dynamo_workers.sim.app import Api, Settings, add_middleware
from dynamo_workers.sim.blocks import none_hash
from dynamo_workers.sim.chat import ModelFolderError, Renderer
from dynamo_workers.sim.engine import Engine
from dynamo_workers.sim.events import EventPublisher, KVEventsConfig
from dynamo_workers.sim.scheduler import Limits, Scheduler
from dynamo_workers.sim.transfer import Connector, TransferConfig
from dynamo_workers.tiny import TOKENIZER_FOLDER

log = logging.getLogger(__name__)

DEFAULT_MODEL = "tiny"
DEFAULT_MAX_MODEL_LEN = 32_768

# Flags of vLLM that change nothing about an engine that computes nothing and writes no access log.
ACCEPTED_SWITCHES = (
    "--disable-uvicorn-access-log",
    "--enable-auto-tool-choice",
    "--enable-chunked-prefill",
    "--enable-log-requests",
    "--enable-server-load-tracking",
    "--enforce-eager",
    "--trust-remote-code",
)
ACCEPTED_VALUES = (
    "--disable-access-log-for-endpoints",
    "--dtype",
    "--gpu-memory-utilization",
    "--kv-cache-dtype",
    "--load-format",
    "--pipeline-parallel-size",
    "--seed",
    "--tensor-parallel-size",
    "--tool-call-parser",
    "--uvicorn-log-level",
)


class SettingsError(Exception):
    """A flag that cannot be used; the message names it and says what would be right."""


def parser() -> argparse.ArgumentParser:
    """The flags; their names and meanings are vLLM's unless the text says otherwise."""
    flags = argparse.ArgumentParser(
        prog="python -m dynamo_workers.sim",
        description="A simulated engine that behaves like vLLM from outside and computes nothing.",
        epilog="Example: python -m dynamo_workers.sim --model tiny --port 8000 --speed 10",
        allow_abbrev=False,
    )
    flags.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    model = flags.add_argument_group("model")
    model.add_argument(
        "--model",
        "--model-path",
        default=None,
        help="a folder with tokenizer.json and tokenizer_config.json, or any name: then the "
        "bundled tokenizer is used (default: tiny)",
    )
    model.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that requests may use; the first one stands in answers (default: --model)",
    )
    model.add_argument("--tokenizer", help="a folder to take the tokenizer from instead")
    model.add_argument("--chat-template", help="a file with a chat template to use instead")
    model.add_argument(
        "--chat-template-content-format", choices=("auto", "string", "openai"), default="auto"
    )
    model.add_argument("--max-model-len", type=_count, help="tokens of prompt and answer together")
    model.add_argument(
        "--enable-lora", action=argparse.BooleanOptionalAction, default=False, help="LoRA adapters"
    )
    model.add_argument(
        "--lora-modules",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="adapters that there are, simulated: nothing is read at their paths",
    )
    model.add_argument(
        "--max-loras", type=_count, default=1, help="adapters in one batch (default: %(default)s)"
    )

    http = flags.add_argument_group("HTTP")
    http.add_argument("--host", default="0.0.0.0", help="address to bind (default: %(default)s)")
    http.add_argument(
        "--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)"
    )
    http.add_argument(
        "--middleware",
        action="append",
        default=[],
        metavar="MODULE.NAME",
        help="an ASGI middleware class, or a function(request, call_next); may be repeated",
    )
    http.add_argument(
        "--enable-prompt-tokens-details",
        action="store_true",
        help="tell in usage how many prompt tokens were cached",
    )
    http.add_argument(
        "--enable-request-id-headers", action="store_true", help="echo X-Request-Id in answers"
    )
    http.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="seconds that running requests get after SIGTERM (default: 0, they are cut)",
    )

    cache = flags.add_argument_group("KV cache and batching")
    cache.add_argument("--block-size", type=_count, default=16, help="tokens (default: 16)")
    cache.add_argument(
        "--num-gpu-blocks-override",
        type=_count,
        default=4096,
        metavar="N",
        help="KV blocks, one of them reserved (default: %(default)s)",
    )
    cache.add_argument("--max-num-seqs", type=_count, default=256, help="default: %(default)s")
    cache.add_argument(
        "--max-num-batched-tokens", type=_count, default=8192, help="default: %(default)s"
    )
    cache.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True
    )
    cache.add_argument("--kv-events-config", metavar="JSON", help="KV events over ZMQ")
    cache.add_argument(
        "--kv-transfer-config",
        metavar="JSON",
        help="KV transfer between prefill and decode engines (NixlConnector, simulated)",
    )

    own = flags.add_argument_group("simulation (not in vLLM)")
    own.add_argument(
        "--timing-profile", metavar="FILE", help="how long prefill and decode take (JSON or YAML)"
    )
    own.add_argument(
        "--speed",
        "--speedup-ratio",
        type=_seconds,
        default=1.0,
        metavar="X",
        help="divides all simulated times; 0 means no time at all (default: 1)",
    )
    own.add_argument(
        "--deterministic",
        action="store_true",
        help="ids and times from the request, one stream event a token, no cached tokens in usage: "
        "same request, same bytes",
    )
    own.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    accepted = flags.add_argument_group("accepted, without effect here")
    for name in ACCEPTED_SWITCHES:
        accepted.add_argument(name, action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    for name in ACCEPTED_VALUES:
        accepted.add_argument(name, help=argparse.SUPPRESS)
    return flags


def build(arguments: argparse.Namespace) -> Api:
    """The application that `arguments` describe; binds the event sockets, needs a running loop."""
    model = arguments.model or arguments.model_tag or DEFAULT_MODEL
    renderer = _renderer(arguments, model)
    names = tuple(arguments.served_model_name or (model,))
    longest = arguments.max_model_len
    if longest is None:
        room = (arguments.num_gpu_blocks_override - 1) * arguments.block_size
        longest = min(_trained_length(Path(model)) or DEFAULT_MAX_MODEL_LEN, max(1, room))
    try:
        limits = Limits(
            block_size=arguments.block_size,
            total_blocks=arguments.num_gpu_blocks_override,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            max_model_len=longest,
            prefix_caching=arguments.enable_prefix_caching,
            max_loras=arguments.max_loras if arguments.enable_lora else 0,
        )
        adapters = parse_adapters(arguments.lora_modules)
        if adapters and not arguments.enable_lora:
            raise ValueError("--lora-modules needs --enable-lora")
        events = (
            None
            if arguments.kv_events_config is None
            else KVEventsConfig.parse(arguments.kv_events_config)
        )
        transfer = (
            None
            if arguments.kv_transfer_config is None
            else TransferConfig.parse(arguments.kv_transfer_config)
        )
        profile = (
            timing_profile.DEFAULT
            if arguments.timing_profile is None
            else timing_profile.load(arguments.timing_profile)
        )
        book = AnswerBook(names[0], renderer)
        publisher = None
        if events is not None and events.publishes and limits.prefix_caching:
            publisher = EventPublisher(events, limits.block_size)
    except (ValueError, OSError, timing_profile.InvalidProfile, ModelFolderError) as error:
        raise SettingsError(str(error)) from error
    scheduler = Scheduler(limits, profile, none_hash(os.environ.get("PYTHONHASHSEED")))
    connector = None
    if transfer is not None:
        host = os.environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST") or "localhost"
        connector = Connector(transfer, host, _side_channel_port(), scheduler)
    api = Api(
        Engine(scheduler, publisher=publisher, connector=connector, speed=arguments.speed),
        renderer,
        book,
        Settings(
            names=names,
            root=model,
            adapters=adapters,
            deterministic=arguments.deterministic,
            # How much was cached depends on what came before, which "same request, same bytes"
            # must not.
            prompt_tokens_details=arguments.enable_prompt_tokens_details
            and not arguments.deterministic,
            request_id_headers=arguments.enable_request_id_headers,
            dev_mode=os.environ.get("VLLM_SERVER_DEV_MODE") == "1",
        ),
        events,
    )
    for name in arguments.middleware:
        try:
            add_middleware(api.app, name)
        except (ImportError, AttributeError, TypeError) as error:
            raise SettingsError(f"--middleware {name}: {error}") from error
    return api


class Server(uvicorn.Server):
    """uvicorn, told to stop by the process's lifecycle instead of by signals."""

    def __init__(self, config: uvicorn.Config, life: lifecycle.Lifecycle) -> None:
        super().__init__(config)
        self._life = life

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("serving at %s:%d", host, port)
            self._life.set_ready()

    async def stop_when_asked(self) -> None:
        await self._life.stop_requested.wait()
        self.should_exit = True


async def serve(arguments: argparse.Namespace, life: lifecycle.Lifecycle) -> int:
    """Serves until a stop is requested; returns the exit code."""
    try:
        api = build(arguments)
    except SettingsError as error:
        log.error("%s", error)
        return 2
    config = uvicorn.Config(
        api.app,
        host=arguments.host,
        port=arguments.port,
        log_config=None,
        access_log=False,
        # Never quite 0: uvicorn would report a timeout at every stop, also of an idle server.
        timeout_graceful_shutdown=cast(int, max(0.05, arguments.shutdown_timeout)),
        # vLLM's: idle connections of a proxy are kept longer than the proxy keeps them.
        timeout_keep_alive=5,
    )
    server = Server(config, life)
    stopping = asyncio.get_running_loop().create_task(server.stop_when_asked())
    try:
        await server.serve()
    except SystemExit:  # uvicorn's way to say that it cannot start; it has logged why
        log.error("cannot serve at %s:%d", arguments.host, arguments.port)
        return 1
    finally:
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the simulated engine; returns the exit code (2 for flags that cannot be used)."""
    arguments = parser().parse_args(with_dashes(sys.argv[1:] if argv is None else argv))
    logs.configure("sim", arguments.log_level)
    # One prompt at a time is encoded; the library's thread pool would only take memory.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return lifecycle.run(lambda life: serve(arguments, life))


def with_dashes(argv: Sequence[str]) -> list[str]:
    """Flags written with underscores, which vLLM takes as well, with dashes."""
    result = []
    for word in argv:
        name, equals, value = word.partition("=")
        result.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return result


def _renderer(arguments: argparse.Namespace, model: str) -> Renderer:
    folder = Path(arguments.tokenizer or model)
    if not (folder / "tokenizer.json").is_file():
        if arguments.tokenizer or folder.is_dir():
            raise SettingsError(f"{folder}: no tokenizer.json there")
        folder = TOKENIZER_FOLDER
        log.info("%s is no folder with a tokenizer: the bundled one is used", model)
    template = None
    if arguments.chat_template is not None:
        try:
            template = Path(arguments.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise SettingsError(
                f"--chat-template {arguments.chat_template}: {error.strerror}"
            ) from error
    try:
        return Renderer(
            folder, template=template, content_format=arguments.chat_template_content_format
        )
    except ModelFolderError as error:
        raise SettingsError(str(error)) from error


def _trained_length(folder: Path) -> int | None:
    """max_position_embeddings of the model's config.json, or None."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        length = config["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return length if isinstance(length, int) and length > 0 else None


def _side_channel_port() -> int:
    name = "VLLM_NIXL_SIDE_CHANNEL_PORT"
    text = os.environ.get(name) or "5600"
    try:
        return _port(text)
    except argparse.ArgumentTypeError as error:
        raise SettingsError(f"{name}={text}: {error}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is expected, got {text}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is from 0 to 65535, got {text}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of at least 0 is expected, got {text}")
    return value
