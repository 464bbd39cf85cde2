"""The pickers of ours that are measured, each as a process of its own.

`python -m benchmarks.epp.pickers KIND ADDRESS ENDPOINTS_FILE`; KIND is

- `floor`: grpc.aio and nothing else: constant answers, relayed chunks
- `protocol`: our server with a picker that always says the same
- `full`: everything that `dynamo frontend` has: parsing, tokens, index, load, journal, metrics
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import uvloop
from dynamo_epp.extproc import Picker, PickRequest, Refusal, Route, wire
from dynamo_epp.server import PickerServer
from dynamo_epp.serving import PickerSettings, ServingKvPicker
from dynamo_runtime.discovery import read_endpoints
from dynamo_runtime.lifecycle import Lifecycle
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from prometheus_client import CollectorRegistry


class Constant:
    """Goes through the endpoints in turn."""

    def __init__(self, endpoints: list[str]) -> None:
        self.endpoints = endpoints
        self.turn = 0

    async def pick(self, _: PickRequest) -> Route:
        self.turn += 1
        return Route((self.endpoints[self.turn % len(self.endpoints)],), routing="constant")

    def answered(self, route: Route) -> None:
        pass

    def released(self, route: Route) -> None:
        pass


class FirstOnly:
    """For a gateway whose upstream cluster takes one address (ORIGINAL_DST)."""

    def __init__(self, picker: Picker) -> None:
        self.picker = picker

    async def pick(self, request: PickRequest) -> Route | Refusal:
        outcome = await self.picker.pick(request)
        if isinstance(outcome, Route):
            outcome.endpoints = outcome.endpoints[:1]
        return outcome

    def answered(self, route: Route) -> None:
        self.picker.answered(route)

    def released(self, route: Route) -> None:
        self.picker.released(route)


async def floor(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
    """As little as the transport allows; not a picker that one could use."""
    duplex = False
    body: list[bytes] = []
    async for data in requests:
        message = pb.ProcessingRequest.FromString(data)
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            mode = message.protocol_config.request_body_mode
            duplex = mode == ProcessingMode.FULL_DUPLEX_STREAMED
            if not duplex:
                await context.write(wire.CONTINUE_REQUEST_HEADERS)
        elif kind == "request_body" and not duplex:
            await context.write(BODY_ANSWER)
        elif kind == "request_body":
            body.append(message.request_body.body)
            if message.request_body.end_of_stream:
                await context.write(HEADERS_ANSWER)
                await context.write(wire.streamed_body(wire.REQUEST_BODY, b"".join(body), True))
        elif kind == "response_headers":
            await context.write(wire.CONTINUE_RESPONSE_HEADERS)
        elif kind == "response_body":
            part = message.response_body
            await context.write(
                wire.streamed_body(wire.RESPONSE_BODY, part.body, part.end_of_stream)
            )


HEADERS_ANSWER = BODY_ANSWER = b""


async def serve_floor(address: str, endpoint: str) -> None:
    global HEADERS_ANSWER, BODY_ANSWER
    mutation = wire.header_mutation([("x-gateway-destination-endpoint", endpoint)])
    metadata = wire.pick_metadata(endpoint, "")
    HEADERS_ANSWER = wire.mutated_headers(mutation, metadata)
    BODY_ANSWER = wire.mutated_body(mutation, None, metadata)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "envoy.service.ext_proc.v3.ExternalProcessor",
                {"Process": grpc.stream_stream_rpc_method_handler(floor)},
            ),
        )
    )
    server.add_insecure_port(address)
    await server.start()
    await ready()


async def ready() -> None:
    print("ready", flush=True)
    await asyncio.Event().wait()


async def main(kind: str, address: str, endpoints_file: Path) -> None:
    endpoints = read_endpoints(endpoints_file)
    if kind == "floor":
        await serve_floor(address, endpoints[0].hostport)
    elif kind == "protocol":
        constant = Constant([endpoint.hostport for endpoint in endpoints])
        server = PickerServer(constant, ready=lambda: True, on_access=lambda _: None)
        await server.start(address)
        await ready()
    elif kind == "full":
        settings = PickerSettings(endpoints_file=endpoints_file)
        serving = ServingKvPicker(settings, Lifecycle(), CollectorRegistry())
        await serving.start(lambda _: None)
        picker = serving if address.startswith("unix:") else FirstOnly(serving)
        server = PickerServer(picker, ready=lambda: True, on_access=serving.logged)
        await server.start(address)
        await ready()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
