"""Three times what the engines can serve, from four tenants, through the frontend of `DYNAMO_URL`.

First eight clients in a closed loop measure the capacity, then requests come at random moments at
three times that rate. Prints one JSON object: for each tenant how its requests ended, their times,
and what they were told to wait.
"""

import asyncio
import hashlib
import json
import os
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import aiohttp

SLOTS = 8  # of all engines together
CALIBRATE_S = 10.0
LOAD_S = 40.0
TIMES = 3.0
TOKENS = 60
TENANTS = {"urgent": (10, 0.05), "flood": (0, 0.70), "modest": (0, 0.15), "batch": (-1, 0.10)}
"""Name -> (priority, share of the requests)."""


@dataclass
class Seen:
    asked: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of those served
    served_in_time: int = 0  # while the load lasted
    unexplained: int = 0  # refusals without a reason or without Retry-After
    retry_after: list[int] = field(default_factory=list)


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url + "/v1/chat/completions"
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.answers: dict[str, str] = {}  # prompt -> digest of the answer
        self.until = 0.0

    async def ask(self, tenant: str, number: int) -> None:
        prompt = f"{tenant} asks for the {number}th time"
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": TOKENS,
        }
        priority = TENANTS[tenant][0] if tenant in TENANTS else 0
        headers = {"x-tenant": tenant, "x-priority": str(priority)}
        seen, began = self.seen[tenant], time.perf_counter()
        seen.asked += 1
        async with self.session.post(self.url, json=body, headers=headers) as answer:
            data = await answer.read()
        now = time.perf_counter()
        if answer.status == 200:
            text = json.loads(data)["choices"][0]["message"]["content"]
            self.answers[prompt] = hashlib.sha256(text.encode()).hexdigest()[:16]
            seen.ended["served"] += 1
            seen.seconds.append(now - began)
            seen.served_in_time += now <= self.until
            return
        reason = answer.headers.get("x-llm-d-request-dropped-reason", "")
        wait = answer.headers.get("retry-after", "")
        seen.ended[f"{answer.status} {reason}"] += 1
        if reason and wait.isdecimal() and int(wait) >= 1:
            seen.retry_after.append(int(wait))
        else:
            seen.unexplained += 1

    async def capacity(self) -> float:
        """Requests a second of a closed loop that keeps all slots busy."""
        end = time.perf_counter() + CALIBRATE_S

        async def loop(number: int) -> None:
            while time.perf_counter() < end:
                await self.ask("calibration", number)
                number += SLOTS

        began = time.perf_counter()
        await asyncio.gather(*(loop(number) for number in range(SLOTS)))
        return self.seen["calibration"].asked / (time.perf_counter() - began)

    async def overload(self, per_s: float) -> None:
        rng = random.Random(3)
        began = time.perf_counter()
        self.until = began + LOAD_S

        async def arrive(tenant: str, rate: float) -> None:
            number = 0
            async with asyncio.TaskGroup() as requests:
                while time.perf_counter() < self.until:
                    requests.create_task(self.ask(tenant, number))
                    number += 1
                    await asyncio.sleep(rng.expovariate(rate))

        async with asyncio.TaskGroup() as tenants:
            for tenant, (_, share) in TENANTS.items():
                tenants.create_task(arrive(tenant, per_s * share))


def told(seen: Seen) -> dict[str, Any]:
    seconds = sorted(seen.seconds)
    return {
        "asked": seen.asked,
        "ended": dict(seen.ended),
        "served_in_time": seen.served_in_time,
        "p50_s": seconds[len(seconds) // 2] if seconds else None,
        "p99_s": seconds[len(seconds) * 99 // 100] if seconds else None,
        "unexplained": seen.unexplained,
        "retry_after": [min(seen.retry_after), max(seen.retry_after)] if seen.retry_after else None,
    }


async def main() -> None:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        client = Client(session, os.environ["DYNAMO_URL"])
        capacity = await client.capacity()
        alone = told(client.seen.pop("calibration"))["p50_s"]
        await client.overload(TIMES * capacity)
    result = {
        "capacity": capacity,
        "alone_p50_s": alone,
        "load_s": LOAD_S,
        "tenants": {tenant: told(client.seen[tenant]) for tenant in TENANTS},
        "answers": client.answers,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main())
