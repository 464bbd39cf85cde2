"""KV transfer between simulated engines, as vLLM's NixlConnector looks from outside.

The protocol of requests is the real one: `do_remote_decode` makes a prefill engine keep a prompt's
blocks and answer with `kv_transfer_params`; with those a decode engine takes the prompt from there.
What runs between the engines (NIXL, over a side channel) is replaced by one line of JSON each way
at the same address, VLLM_NIXL_SIDE_CHANNEL_HOST and _PORT.

Blocks are kept until they were fetched, or until their lease ends (`kv_lease_duration`, 30 s).
Stricter than vLLM 0.32: incomplete parameters, which end that engine, are refused with 400; and
parameters of another prompt, which it follows and so answers another's question, fail as a transfer
does whose blocks are gone.
"""

import asyncio
import contextlib
import hashlib
import logging
import uuid
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dynamo_workers.sim import scheduler as model
from dynamo_workers.sim.adapters import Adapter
from dynamo_workers.sim.errors import RequestError

log = logging.getLogger(__name__)

CONNECTORS = ("NixlConnector", "NixlPullConnector")
ROLES = ("kv_producer", "kv_consumer", "kv_both")
LEASE_S = 30.0
ANSWER_S = 5.0  # how long vLLM waits for a handshake
LONGEST_LINE = 65_536


class TransferConfig(msgspec.Struct, frozen=True):
    """vLLM's --kv-transfer-config; fields that have no meaning here are passed over."""

    kv_connector: str
    kv_role: str
    kv_load_failure_policy: str = "fail"
    kv_connector_extra_config: dict[str, Any] = {}

    @classmethod
    def parse(cls, text: str) -> "TransferConfig":
        """Raises ValueError naming the field."""
        flag = "--kv-transfer-config"
        try:
            config = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"{flag} {text!r}: {error}") from error
        for name, allowed in (
            ("kv_connector", CONNECTORS),
            ("kv_role", ROLES),
            ("kv_load_failure_policy", ("fail", "recompute")),
        ):
            if getattr(config, name) not in allowed:
                raise ValueError(
                    f"{flag}: {name} {getattr(config, name)!r} is not simulated; "
                    f"use one of {', '.join(allowed)}"
                )
        if not config.lease_s > 0:
            raise ValueError(f"{flag}: kv_lease_duration must be a number of seconds above 0")
        return config

    @property
    def lease_s(self) -> float:
        value = self.kv_connector_extra_config.get("kv_lease_duration", LEASE_S)
        return float(value) if isinstance(value, int | float) else -1.0


class _Question(msgspec.Struct):
    engine_id: str
    request_id: str
    prompt: str  # digest


class _Answer(msgspec.Struct):
    tokens: int = 0
    error: str = ""


@dataclass(slots=True)
class _Held:
    sequence: model.Sequence
    prompt: str  # digest
    lease: asyncio.TimerHandle


@dataclass(slots=True)
class Counts:
    """For the metrics."""

    transfers: int = 0
    failed: int = 0
    expired: int = 0


class TransferFailed(Exception):
    """Another engine does not give the blocks; the message says why."""


@dataclass(slots=True, eq=False)
class Connector:
    """One engine's end of all transfers."""

    config: TransferConfig
    host: str
    port: int
    scheduler: model.Scheduler
    counts: Counts = field(default_factory=Counts)
    engine_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    _held: dict[str, _Held] = field(default_factory=dict)  # by request id, until fetched or expired
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises OSError where the side channel's address is taken."""
        self._server = await asyncio.start_server(
            self._serve, self.host, self.port, limit=LONGEST_LINE
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        for request_id in list(self._held):
            self._let_go(request_id)
        if self._server is not None:
            self._server.close()
            self._server = None

    # --- the prefill engine

    def hold(self, sequence: model.Sequence) -> dict[str, Any]:
        """Put what ``sequence`` computed under lease; the parameters that lead there."""
        name = f"{sequence.keep_as}-{uuid.uuid4().hex[:8]}"
        lease = asyncio.get_running_loop().call_later(self.config.lease_s, self._expire, name)
        prompt = digest(sequence.prompt, sequence.adapter)
        self._held[name] = _Held(sequence, prompt, lease)
        blocks = -(-len(sequence.prompt) // self.scheduler.limits.block_size)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [sequence.blocks[:blocks]],
            "remote_engine_id": self.engine_id,
            "remote_request_id": name,
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": len(sequence.prompt),
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": max(0, sequence.cached_tokens),
        }

    def _expire(self, request_id: str) -> None:
        log.warning("releasing expired KV blocks of request %s", request_id)
        self.counts.expired += 1
        self._let_go(request_id)

    def _let_go(self, request_id: str) -> None:
        held = self._held.pop(request_id)
        held.lease.cancel()
        self.scheduler.release_kept(held.sequence)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = msgspec.json.decode(await reader.readline(), type=_Question)
            writer.write(msgspec.json.encode(self._answer(question)) + b"\n")
            await writer.drain()
        except (msgspec.DecodeError, ValueError, OSError) as error:
            log.warning("a question on the side channel was not understood: %s", error)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, question: _Question) -> _Answer:
        if question.engine_id != self.engine_id:
            return _Answer(error=f"this is engine {self.engine_id}, not {question.engine_id}")
        held = self._held.get(question.request_id)
        if held is None:
            return _Answer(error=f"no blocks are kept for request {question.request_id}")
        if held.prompt != question.prompt:
            return _Answer(error=f"the blocks of {question.request_id} hold another prompt")
        tokens = len(held.sequence.prompt)
        self._let_go(question.request_id)
        return _Answer(tokens=tokens)

    # --- the decode engine

    async def fetch(
        self, params: Mapping[str, Any], prompt: Sequence[int], adapter: Adapter | None = None
    ) -> int:
        """Take a prompt from another engine; how many of its tokens need not be computed here.

        Raises RequestError: 400 for incomplete parameters, 500 where the transfer failed and
        kv_load_failure_policy does not let the prompt be computed here.
        """
        where = check(params)
        try:
            async with asyncio.timeout(ANSWER_S):
                tokens = await self._ask(*where, params, digest(prompt, adapter))
        except (TransferFailed, OSError, TimeoutError, ValueError) as error:
            self.counts.failed += 1
            log.warning("a KV transfer failed: %s", error or type(error).__name__)
            if self.config.kv_load_failure_policy == "fail":
                raise RequestError("Internal server error", status=500) from error
            return 0
        self.counts.transfers += 1
        return tokens

    async def _ask(self, host: str, port: int, params: Mapping[str, Any], prompt: str) -> int:
        reader, writer = await asyncio.open_connection(host, port, limit=LONGEST_LINE)
        try:
            question = _Question(
                str(params["remote_engine_id"]), str(params["remote_request_id"]), prompt
            )
            writer.write(msgspec.json.encode(question) + b"\n")
            await writer.drain()
            answer = msgspec.json.decode(await reader.readline(), type=_Answer)
        finally:
            writer.close()
        if answer.error:
            raise TransferFailed(answer.error)
        return answer.tokens


def check(params: Mapping[str, Any]) -> tuple[str, int]:
    """Host and port in parameters of a remote prefill. Raises RequestError naming the field."""
    for name in ("remote_engine_id", "remote_request_id", "remote_block_ids"):
        if not params.get(name):
            raise RequestError(
                f"kv_transfer_params has no {name}.", param=f"kv_transfer_params.{name}"
            )
    host, port = params.get("remote_host"), params.get("remote_port")
    if not isinstance(host, str) or not host:
        raise RequestError(
            "kv_transfer_params has no remote_host.", param="kv_transfer_params.remote_host"
        )
    if not isinstance(port, int) or not 0 < port < 65536:
        raise RequestError(
            "kv_transfer_params has no remote_port.", param="kv_transfer_params.remote_port"
        )
    return host, port


def digest(prompt: Sequence[int], adapter: Adapter | None = None) -> str:
    """What tells one prompt from another."""
    told = hashlib.sha256(array("I", prompt).tobytes())
    told.update(b"" if adapter is None else adapter.name.encode())
    return told.hexdigest()
