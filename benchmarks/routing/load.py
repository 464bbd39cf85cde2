"""Conversations that share prefixes, through whatever frontend `DYNAMO_URL` names.

Prints one JSON object: prompt and cached tokens as the engines report them, and the times to first
token. Answers are compared between modes by their digest: the simulated engines' text depends on
the prompt alone, so every mode has to give the same.
"""

import asyncio
import hashlib
import json
import os
import random
import time

import aiohttp

GROUPS = 64
CONVERSATIONS = 2  # in each group
TURNS = 4
SYSTEM_WORDS = 1200
USER_WORDS = 30
CONCURRENCY = 8
WORDS = (
    "serve model token block cache prefix worker router engine batch prefill decode stream queue "
    "load graph pod node probe drain event index key chain hash match score cost rank pick"
)


async def ask(
    session: aiohttp.ClientSession, url: str, messages: list[dict[str, str]]
) -> tuple[str, dict[str, int], float]:
    """Answer, token counts, seconds to the first token."""
    body = {
        "model": "tiny",
        "messages": messages,
        "max_tokens": 16,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, text, usage = time.perf_counter(), 0.0, [], {}
    async with session.post(url + "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                if content := choice["delta"].get("content"):
                    first = first or time.perf_counter() - started
                    text.append(content)
            if counts := chunk.get("usage"):
                usage = {
                    "prompt": counts["prompt_tokens"],
                    "cached": counts["prompt_tokens_details"]["cached_tokens"],
                }
    return "".join(text), usage, first


async def main() -> None:
    rng = random.Random(7)
    words = WORDS.split()
    systems = [" ".join(rng.choices(words, k=SYSTEM_WORDS)) for _ in range(GROUPS)]
    talks = [
        [" ".join(rng.choices(words, k=USER_WORDS)) for _ in range(TURNS)]
        for _ in range(GROUPS * CONVERSATIONS)
    ]
    order = list(range(len(talks)))
    rng.shuffle(order)
    url = os.environ["DYNAMO_URL"]
    prompt = cached = 0
    firsts: list[float] = []
    answers: dict[int, str] = {}
    queue = iter(order)
    async with aiohttp.ClientSession() as session:

        async def client() -> None:
            nonlocal prompt, cached
            for number in queue:
                messages = [{"role": "system", "content": systems[number % GROUPS]}]
                said = hashlib.sha256()
                for question in talks[number]:
                    messages.append({"role": "user", "content": question})
                    text, usage, first = await ask(session, url, messages)
                    messages.append({"role": "assistant", "content": text})
                    prompt += usage["prompt"]
                    cached += usage["cached"]
                    firsts.append(first)
                    said.update(text.encode())
                answers[number] = said.hexdigest()

        await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    firsts.sort()
    everything = hashlib.sha256("".join(answers[n] for n in sorted(answers)).encode())
    result = {
        "requests": len(firsts),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "ttft_p50_ms": firsts[len(firsts) // 2] * 1e3,
        "ttft_p90_ms": firsts[len(firsts) * 9 // 10] * 1e3,
        "answers": everything.hexdigest(),
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main())
