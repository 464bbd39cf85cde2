"""Eight engines in one process: answers to the byte, vLLM's metrics, and our worker stream.

They behave like workers behind our launcher as far as a picker can see: tokenizer files over HTTP,
each prompt's blocks announced as cached once it was served, and accepted, first token and finished
of every request. `python -m benchmarks.epp.engines ADDRESS…`
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

import dynamo_workers.tiny
import numpy as np
import uvloop
from aiohttp import web
from dynamo_epp.requests import parse
from dynamo_epp.tokenize import Tokenizer
from dynamo_kv_router.keys import block_keys, model_seed
from dynamo_kv_router.stream.format import WorkerInfo
from dynamo_kv_router.stream.publisher import WorkerPublisher

from benchmarks.epp.traffic import CHUNK_EVERY_S, MODEL, answer_parts

BLOCK_SIZE = 16
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
METRICS = b"""# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="bench"} 0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="bench"} 0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{model_name="bench"} 0.1
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",num_gpu_blocks="20000"} 1
"""


class Engine:
    def __init__(self, address: str, files: dict[str, bytes], tokenizer: Tokenizer) -> None:
        self.address = address
        self.files = files
        self.tokenizer = tokenizer
        self.cached: set[int] = set()
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self.publisher = WorkerPublisher(
            f"tcp://{address}:5557",
            WorkerInfo(
                worker=f"engine-{address}",
                model=MODEL,
                models=[MODEL],
                block_size=BLOCK_SIZE,
                total_blocks=20_000,
                max_model_len=32_768,
                max_num_batched_tokens=8192,
                runtime="sim",
                tokenizer=digests,
            ),
        )

    async def start(self) -> None:
        await self.publisher.start()
        api = web.Application(client_max_size=1 << 26)
        api.router.add_get("/metrics", self.metrics)
        api.router.add_get("/v1/models", self.models)
        api.router.add_get("/health", self.healthy)
        api.router.add_post("/v1/chat/completions", self.chat)
        status = web.Application()
        status.router.add_get("/tokenizer/{name}", self.tokenizer_file)
        for app, port in ((api, 8000), (status, 9090)):
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, self.address, port, backlog=1024).start()

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=METRICS, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def healthy(self, _: web.Request) -> web.Response:
        return web.Response()

    async def tokenizer_file(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["name"]])

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        booking = request.headers.get("x-dynamo-booking", "").partition(";")[0]
        publisher = self.publisher
        tokens = 0
        if booking:
            parsed = parse("/v1/chat/completions", body)
            assert parsed.prompt is not None
            (ids,) = self.tokenizer.tokenize(parsed.prompt)
            tokens = len(ids)
            publisher.accepted(booking, tokens, 0)
            keys = block_keys(ids, BLOCK_SIZE, seed=model_seed(MODEL))
            new = [key for key in keys.tolist() if key not in self.cached]
            if new:
                self.cached.update(new)
                publisher.store(np.array(new, dtype=keys.dtype))
            publisher.first_token(booking)
        stream = b'"stream": true' in body
        parts = answer_parts(body, stream)
        if stream:
            response: web.StreamResponse = web.StreamResponse()
            response.content_type = "text/event-stream"
            await response.prepare(request)
            for part in parts:
                await response.write(part)
                await asyncio.sleep(CHUNK_EVERY_S)
            await response.write_eof()
        else:
            response = web.Response(body=parts[0], content_type="application/json")
        if booking:
            publisher.finished(
                booking, prompt_tokens=tokens, cached_tokens=0, completion_tokens=len(parts)
            )
        return response


async def main(addresses: list[str]) -> None:
    paths = [Path(dynamo_workers.tiny.__path__[0], name) for name in TOKENIZER_FILES]
    files = {path.name: path.read_bytes() for path in paths}
    tokenizer = Tokenizer.from_files(files, {})
    for address in addresses:
        await Engine(address, files, tokenizer).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
