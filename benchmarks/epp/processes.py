"""The processes that are measured: pickers, and an Envoy before each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import yaml
from dynamo_epp.frontend.bootstrap import Sockets
from dynamo_runtime.child import Child

LLM_D_PORT = 18002
"""It listens on every address, here and on the two ports behind this one."""
TICKS = os.sysconf("SC_CLK_TCK")

SCORERS = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
- type: max-score-picker
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
  - {pluginRef: max-score-picker}
"""

"""llm-d's default scorers, as both pickers read them."""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextlib.asynccontextmanager
async def process(argv: list[str], log: Path, *, until: str) -> AsyncIterator[int]:
    """Run ``argv`` until the block ends; it is up when it printed ``until``."""
    up = asyncio.Event()
    with log.open("a") as out:

        def on_line(line: str) -> None:
            out.write(line + "\n")
            if until in line:
                up.set()

        child = await Child.start(argv, on_line=on_line)
        ended = asyncio.create_task(child.wait())
        waiting = asyncio.create_task(up.wait())
        try:
            await asyncio.wait({ended, waiting}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
            if not up.is_set():
                out.flush()
                raise SystemExit(f"{argv[:4]} did not start:\n{log.read_text()[-2000:]}")
            yield child.pid
        finally:
            waiting.cancel()
            await child.stop(3)
            await ended


def ours(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.epp.{module}", *arguments]


@contextlib.asynccontextmanager
async def llm_d(binary: str, engines: Sequence[str], work: Path) -> AsyncIterator[int]:
    """llm-d's picker before the engines at these hosts; its process id."""
    endpoints = work / "llm-d-endpoints.yaml"
    listed = [{"name": f"e{n}", "address": host, "port": "8000"} for n, host in enumerate(engines)]
    endpoints.write_text(yaml.safe_dump({"endpoints": listed}))
    config = yaml.safe_load(SCORERS)
    discovery = {"type": "file-discovery", "parameters": {"path": str(endpoints)}}
    config["plugins"].append(discovery)
    config["dataLayer"] = {"discovery": {"pluginRef": "file-discovery"}}
    file = work / "llm-d.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [
        binary,
        *("--config-file", str(file), "--pool-name", "bench"),
        *("--grpc-port", str(LLM_D_PORT), "--grpc-health-port", str(LLM_D_PORT + 1)),
        *("--metrics-port", str(LLM_D_PORT + 2), "--metrics-endpoint-auth=false"),
        *("--secure-serving=false", "--tracing=false", "--allow-experimental-plugins"),
        *("--enable-pprof=false", "--zap-log-level=info"),
    ]
    async with process(argv, work / "llm-d.log", until="") as pid:
        await connects(f"127.0.0.1:{LLM_D_PORT}")
        yield pid


async def connects(address: str) -> None:
    """Until a gRPC server answers at ``address``."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(60):
        await channel.channel_ready()


def gateway(listen: tuple[str, int], sockets: Sockets, picker: str) -> str:
    """Envoy's configuration: it listens at ``listen`` and asks the picker at ``host:port``."""
    host, _, port = picker.rpartition(":")

    text = Path(__file__).with_name("gateway.yaml").read_text()
    for name, value in {
        "@ADMIN@": json.dumps({"pipe": {"path": str(sockets.admin)}}),
        "@LISTEN@": _tcp(*listen),
        "@PICKER@": _tcp(host, int(port)),
        "@RESPONSE_BODY_MODE@": "FULL_DUPLEX_STREAMED",
    }.items():
        text = text.replace(name, value)
    return json.dumps(yaml.safe_load(text))


def _tcp(host: str, port: int) -> str:
    return json.dumps({"socket_address": {"address": host, "port_value": port}})
