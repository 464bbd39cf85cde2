"""Three times what the engines can serve, from five tenants, through the frontend of `DYNAMO_URL`.

First as many clients as there are slots measure the capacity in a closed loop, then requests come
at random moments at three times that rate: for a while until the queue has its usual length, then
for the time in which is counted who gets what. Prints one JSON object: for each tenant how its
requests ended, their times, and what they were told to wait.
"""

import argparse
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

TIMES = 3.0
TENANTS = {
    "urgent": (10, 0.05),
    "flood": (0, 0.66),
    "brisk": (0, 0.19),
    "modest": (0, 0.066),
    "batch": (-1, 0.034),
}
"""Name -> (priority, share of the requests). Of those with priority 0, flood asks for ten times as
much as modest, which stays below its fair share, and brisk for more than its own."""


@dataclass
class Seen:
    asked: int = 0
    asked_settled: int = 0  # once the queue had its usual length, until the load ended
    ended: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of those served
    served_settled: int = 0  # that ended in the same time
    broken: list[str] = field(default_factory=list)  # neither an answer nor a refusal
    unexplained: list[str] = field(default_factory=list)  # refusals that lack a part
    retry_after: list[int] = field(default_factory=list)


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str, tokens: int) -> None:
        self.session = session
        self.url = url + "/v1/chat/completions"
        self.tokens = tokens  # of each answer
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.answers: dict[str, str] = {}  # prompt -> digest of the answer
        self.settled = self.until = 0.0  # moments of the load

    async def ask(self, tenant: str, number: int) -> None:
        prompt = f"{tenant} asks for the {number}th time"
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.tokens,
        }
        priority = TENANTS[tenant][0] if tenant in TENANTS else 0
        headers = {"x-tenant": tenant, "x-priority": str(priority)}
        seen, began = self.seen[tenant], time.perf_counter()
        seen.asked += 1
        seen.asked_settled += self.settled <= began <= self.until
        try:
            async with self.session.post(self.url, json=body, headers=headers) as answer:
                data = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.ended["broken"] += 1
            seen.broken.append(repr(error))
            return
        now = time.perf_counter()
        if answer.status == 200:
            text = json.loads(data)["choices"][0]["message"]["content"]
            self.answers[prompt] = hashlib.sha256(text.encode()).hexdigest()[:16]
            seen.ended["served"] += 1
            seen.seconds.append(now - began)
            seen.served_settled += self.settled <= now <= self.until
            return
        reason = answer.headers.get("x-llm-d-request-dropped-reason", "")
        wait = answer.headers.get("retry-after", "")
        seen.ended[f"{answer.status} {reason}"] += 1
        if reason and wait.isdecimal() and int(wait) >= 1 and is_error(data):
            seen.retry_after.append(int(wait))
        else:
            seen.unexplained.append(f"{answer.status} {dict(answer.headers)} {data!r}")

    async def capacity(self, slots: int, seconds: float) -> float:
        """Requests a second of a closed loop that keeps all slots busy."""
        end = time.perf_counter() + seconds

        async def loop(number: int) -> None:
            while time.perf_counter() < end:
                await self.ask("calibration", number)
                number += slots

        began = time.perf_counter()
        await asyncio.gather(*(loop(number) for number in range(slots)))
        return self.seen["calibration"].asked / (time.perf_counter() - began)

    async def overload(self, per_s: float, settle_s: float, seconds: float) -> None:
        rng = random.Random(3)
        began = time.perf_counter()
        self.settled = began + settle_s
        self.until = self.settled + seconds

        async def arrive(tenant: str, rate: float) -> None:
            # By a timetable: a machine that is late catches up, so the rate is what it should be.
            due, number = began + rng.expovariate(rate), 0
            async with asyncio.TaskGroup() as requests:
                while due < self.until:
                    await asyncio.sleep(due - time.perf_counter())
                    requests.create_task(self.ask(tenant, number))
                    due += rng.expovariate(rate)
                    number += 1

        async with asyncio.TaskGroup() as tenants:
            for tenant, (_, share) in TENANTS.items():
                tenants.create_task(arrive(tenant, per_s * share))


def is_error(body: bytes) -> bool:
    """Whether it is an error as OpenAI's API words it."""
    try:
        error = json.loads(body)["error"]
        return bool(error["message"] and error["type"])
    except (ValueError, KeyError, TypeError):
        return False


def told(seen: Seen) -> dict[str, Any]:
    seconds = sorted(seen.seconds)
    return {
        "asked": seen.asked,
        "ended": dict(seen.ended),
        "asked_settled": seen.asked_settled,
        "served_settled": seen.served_settled,
        "p50_s": seconds[len(seconds) // 2] if seconds else None,
        "p99_s": seconds[len(seconds) * 99 // 100] if seconds else None,
        "broken": seen.broken,
        "unexplained": seen.unexplained,
        "retry_after": [min(seen.retry_after), max(seen.retry_after)] if seen.retry_after else None,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, required=True, help="of all engines together")
    parser.add_argument("--tokens", type=int, default=60, help="of each answer")
    parser.add_argument("--calibrate-seconds", type=float, default=10.0)
    parser.add_argument("--settle-seconds", type=float, default=10.0)
    parser.add_argument("--load-seconds", type=float, default=40.0, help="after those")
    options = parser.parse_args()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        client = Client(session, os.environ["DYNAMO_URL"], options.tokens)
        capacity = await client.capacity(options.slots, options.calibrate_seconds)
        calibration = told(client.seen.pop("calibration"))
        per_s = TIMES * capacity
        await client.overload(per_s, options.settle_seconds, options.load_seconds)
    result = {
        "capacity": capacity,
        "alone": calibration,
        "load_s": options.load_seconds,
        "tenants": {tenant: told(client.seen[tenant]) for tenant in TENANTS},
        "answers": client.answers,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main())
