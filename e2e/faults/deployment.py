"""Engines, a picker and an Envoy as processes on loopback addresses, to be killed and stopped.

Two kinds of engine: simulated ones under our launcher, and bare ones that a picker knows by what it
asks of them, as it knows stock vLLM. Two places for the picker: in `dynamo frontend` with an Envoy
of its own, and in `dynamo epp` behind an Envoy as somebody else's Gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp
from dynamo_epp.frontend.envoy import find_envoy
from dynamo_runtime.child import Child, signal_group
from dynamo_runtime.discovery import Endpoint, write_endpoints
from prometheus_client.parser import text_string_to_metric_families

from e2e.faults.wire import LossyWire
from e2e.gateway import envoy as gateway

HTTP_PORT, STATUS_PORT, STREAM_PORT, PICKER_PORT, WIRE_PORT = 8000, 9090, 5557, 9002, 5560
START_S = 60.0
HEALTH_TIMEOUT_S, HUNG_S = 1.0, 8.0
"""Of our launcher, which by itself is more patient."""
ENGINE = ("--served-model-name=tiny", "--enable-prompt-tokens-details", "--log-level=warning")
PREFIX_WEIGHT = 20
"""What is cached decides, whatever runs where: there is one right place for each request."""


def free_address() -> str:
    """A loopback address on which all of these ports are free."""
    while True:
        octets = (random.randrange(64, 255), random.randrange(256), random.randrange(1, 255))
        address = "127." + ".".join(map(str, octets))
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in (HTTP_PORT, STATUS_PORT, STREAM_PORT, PICKER_PORT, WIRE_PORT):
                held.enter_context(socket.socket()).bind((address, port))
            return address


class Program:
    """A process that may be ended and started again, with all that it starts."""

    def __init__(self, argv: Sequence[str], env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._argv, self._env = argv, {**os.environ, **env}
        self.child: Child | None = None

    async def start(self) -> None:
        self.child = await Child.start(self._argv, env=self._env, on_line=self.lines.append)

    @property
    def pid(self) -> int:
        assert self.child is not None
        return self.child.pid

    async def answering(self, url: str) -> None:
        """Wait until there is a good answer at that place of it."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1)) as client:

            async def answers() -> bool:
                assert self.child is not None
                assert self.child.returncode is None, "\n".join(self.lines[-20:])
                try:
                    async with client.get(url) as answer:
                        return answer.status == 200
                except (aiohttp.ClientError, TimeoutError):
                    return False

            await eventually(answers, START_S)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self.child is not None
        self.child.send_signal(signal.SIGKILL)
        await self.child.wait()

    async def close(self) -> None:
        if self.child is None:
            return
        for pid in (*descendants(self.child.pid), self.child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.child.stop(5.0), 10.0)
        signal_group(self.child.pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [*descendants(int(child)), int(child)]
    return found


class Node:
    """One engine, with the wire on which it tells what it caches."""

    def __init__(self, name: str, folder: Path, *, stock: bool, replay: bool, seed: int) -> None:
        self.name, self.stock = name, stock
        self.address = free_address()
        self._fault = folder / f"{name}.fault"
        self._fault.write_text("")
        env = {
            "ENGINE_FAULT": str(self._fault),
            "PYTHONPATH": str(Path(__file__).parent),
            "TMPDIR": str(folder),
        }
        middleware = ("--middleware", "engine_side.Faulty")
        if stock:
            events, told = (f"ipc://{folder}/{name}.{end}" for end in ("events", "wire"))
            config: dict[str, Any] = {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": events,
            }
            source: dict[str, Any] = {"endpoint": told}
            if replay:
                replays = f"ipc://{folder}/{name}.replay"
                config["replay_endpoint"] = source["replay_endpoint"] = replays
            env["KV_SOURCES"] = json.dumps({"0": source})
            argv = [
                *(sys.executable, "-m", "dynamo_workers.sim", *ENGINE, *middleware),
                *("--host", self.address, "--port", str(HTTP_PORT)),
                *("--kv-events-config", json.dumps(config)),
            ]
            self.wire = LossyWire(events, told, random.Random(seed))
        else:
            env |= {
                "POD_NAME": name,
                "DYN_HTTP_HOST": self.address,
                "DYN_SYSTEM_HOST": self.address,
                "DYN_HEALTH_TIMEOUT_SECONDS": str(HEALTH_TIMEOUT_S),
                "DYN_HUNG_SECONDS": str(HUNG_S),
            }
            argv = [sys.executable, "-m", "dynamo_workers.worker", "sim", *ENGINE, *middleware]
            self.wire = LossyWire(
                f"tcp://{self.address}:{STREAM_PORT}",
                f"tcp://{self.address}:{WIRE_PORT}",
                random.Random(seed),
            )
        self.program = Program(argv, env)

    @property
    def endpoint(self) -> Endpoint:
        """Always ready: whoever watches pods learns of a fault later than anybody else."""
        ports = {} if self.stock else {"stream_port": WIRE_PORT, "status_port": STATUS_PORT}
        return Endpoint(self.name, self.address, HTTP_PORT, ready=True, **ports)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{HTTP_PORT}"

    def engine(self) -> int:
        """The process that answers."""
        if self.stock:
            return self.program.pid
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in self._children()}
        (engine,) = [pid for pid, line in lines.items() if "dynamo_workers.sim" in line]
        return engine

    def _children(self) -> list[int]:
        return descendants(self.program.pid)

    def signal(self, number: signal.Signals, *, whole: bool = False) -> None:
        """To the engine alone, or to the whole pod."""
        for pid in [*self._children(), self.program.pid] if whole else [self.engine()]:
            os.kill(pid, number)

    def fail_metrics(self, how: str) -> None:
        """From now on: `503`, `hang`, or "" for none of it."""
        self._fault.write_text(how)

    async def kill(self) -> None:
        """The whole pod at once."""
        pids = [*self._children(), self.program.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.program.child is not None
        await self.program.child.wait()

    async def restarted(self) -> None:
        """Start again; return when the engine answers."""
        await self.program.start()
        await self.program.answering(f"{self.url}/health")

    async def ended(self, limit_s: float) -> None:
        """Wait until it has ended by itself."""
        assert self.program.child is not None
        await asyncio.wait_for(self.program.child.wait(), limit_s)


async def eventually(true: Callable[[], Awaitable[bool]], limit_s: float) -> None:
    async with asyncio.timeout(limit_s):
        while True:
            if await true():
                return
            await asyncio.sleep(0.1)


class Deployment:
    """`async with Deployment(stock=…, own_envoy=…) as it: …`; nothing of it is left at the end."""

    def __init__(
        self, *, stock: bool, own_envoy: bool, replay: bool = True, nodes: int = 3, seed: int = 1
    ) -> None:
        self.stock, self.own_envoy = stock, own_envoy
        self.replay = replay or not stock
        self._folder = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))
        self.nodes = [
            Node(f"w-{n}", self._folder, stock=stock, replay=replay, seed=seed + n)
            for n in range(nodes)
        ]
        self._address = free_address()
        endpoints = self._folder / "endpoints.json"
        write_endpoints(endpoints, [node.endpoint for node in self.nodes])
        command = (sys.executable, "-m", "dynamo_cli.main")
        settings = ("--endpoints-file", str(endpoints), "--decision-header")
        self.gateway: Program | None = None
        if own_envoy:
            env = {
                "DYN_HTTP_HOST": self._address,
                "DYN_SYSTEM_HOST": self._address,
                "DYN_ENVOY_CONCURRENCY": "1",
                "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT": str(PREFIX_WEIGHT),
                "DYN_ROUTER_PREFILL_LOAD_SCALE": str(PREFIX_WEIGHT),
                "DYN_ROUTER_UNCONFIRMED_SPREAD": "0",
                "TMPDIR": str(self._folder),
            }
            self.picker = Program((*command, "frontend", *settings), env)
        else:
            more = ("--host", self._address, "--fallback-endpoints", "2", "--drain-accept", "0")
            config = ("--config-text", json.dumps(CONFIG))
            self.picker = Program((*command, "epp", *settings, *more, *config), {})
            file = self._folder / "envoy.json"
            file.write_text(json.dumps(self._gateway_config()))
            flags = ("--concurrency", "1", "--log-level", "warning", "--disable-hot-restart")
            self.gateway = Program((str(find_envoy()), "-c", str(file), *flags), {})
        self._stack = contextlib.AsyncExitStack()

    @property
    def url(self) -> str:
        """Where clients go."""
        return f"http://{self._address}:{HTTP_PORT}"

    @property
    def status_url(self) -> str:
        return f"http://{self._address}:{STATUS_PORT}"

    def node_of(self, engine: int) -> Node:
        return next(node for node in self.nodes if node.engine() == engine)

    def _gateway_config(self) -> Any:
        """As for a pool in a cluster, with addresses in the place of names."""
        pool = gateway.Backend(
            "pool", pods={}, port=HTTP_PORT, picker={}, picker_port=PICKER_PORT, weight=1
        )
        config = gateway.config([pool])
        resources = config["static_resources"]
        (listener,) = resources["listeners"]
        listener["address"]["socket_address"] |= {
            "address": self._address,
            "port_value": HTTP_PORT,
        }
        pods, picker = resources["clusters"]
        for cluster, places in (
            (pods, [(node.address, HTTP_PORT) for node in self.nodes]),
            (picker, [(self._address, PICKER_PORT)]),
        ):
            cluster["type"] = "STATIC"
            cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
                {"endpoint": {"address": {"socket_address": {"address": a, "port_value": p}}}}
                for a, p in places
            ]
        return config

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            stack.callback(self._show)
            programs = [*(node.program for node in self.nodes), self.picker]
            programs += [self.gateway] if self.gateway is not None else []
            for node in self.nodes:
                await stack.enter_async_context(node.wire)
            for program in programs:
                stack.push_async_callback(program.close)
                await program.start()
            for node in self.nodes:
                await node.program.answering(f"{node.url}/health")
            await self.picker.answering(f"{self.status_url}/ready")
            await self._until_exact()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _until_exact(self) -> None:
        await self.until(len(self.nodes), "dynamo_epp_workers", START_S, state="exact")

    async def restart_picker(self) -> None:
        """Right after its end, as a kubelet does the first time; return when it is ready."""
        await self.picker.start()
        await self.picker.answering(f"{self.status_url}/ready")

    async def workers(self) -> list[dict[str, Any]]:
        """As the picker shows them."""
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"{self.status_url}/debug/workers") as answer,
        ):
            shown: list[dict[str, Any]] = (await answer.json())["workers"]
            return shown

    async def metric(self, name: str, **labels: str) -> float:
        """Of the picker; 0 if it says nothing of it."""
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"{self.status_url}/metrics") as answer,
        ):
            text = await answer.text()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    async def until(self, value: float, name: str, limit_s: float, **labels: str) -> None:
        """Until a metric of the picker has this value."""

        async def has_it() -> bool:
            return await self.metric(name, **labels) == value

        await eventually(has_it, limit_s)

    def _show(self) -> None:
        """Shown only if the test failed."""
        named = [(node.name, node.program) for node in self.nodes] + [("picker", self.picker)]
        named += [("gateway", self.gateway)] if self.gateway is not None else []
        for name, program in named:
            print(f"--- {name}", *program.lines[-60:], sep="\n")


CONFIG = {
    "apiVersion": "llm-d.ai/v1alpha1",
    "kind": "EndpointPickerConfig",
    "plugins": [
        {
            "type": "kv-cost-scorer",
            "parameters": {
                "overlapScoreCredit": PREFIX_WEIGHT,
                "prefillLoadScale": PREFIX_WEIGHT,
            },
        },
        {"type": "max-score-picker"},
    ],
    "schedulingProfiles": [
        {
            "name": "default",
            "plugins": [{"pluginRef": "kv-cost-scorer"}, {"pluginRef": "max-score-picker"}],
        }
    ],
}
