"""The example with a planner, run as users run it: real Envoy, picker, planner and (simulated)
engines as processes. Load comes and goes, and workers with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "planner.yaml"

LOAD = """
import concurrent.futures, json, os, sys, time, urllib.request
from pathlib import Path

def get(url, body=None):
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()

front = os.environ["DYNAMO_URL"]
(record,) = Path(os.environ["XDG_RUNTIME_DIR"], "dynamo").glob("up-*.json")

def pods():
    return json.loads(record.read_text())["pods"]

def ready():
    return sum(pod["role"] == "worker" and pod["ready"] for pod in pods())

planner = next(pod["address"] for pod in pods() if pod["role"] == "planner")
status = f"http://{planner}:9090"

def ask(number):
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"{number} " * 60}],
            "max_tokens": 500, "ignore_eos": True}
    return json.loads(get(front + "/v1/chat/completions", json.dumps(body).encode()))

def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()

before = ready()
with concurrent.futures.ThreadPoolExecutor(60) as many:
    answers = list(many.map(ask, range(180)))
    most = until(lambda: ready() > 1)
back = until(lambda: ready() == 1, 90)
print(json.dumps({
    "before": before, "most": most, "back": back, "answers": len(answers),
    "decisions": json.loads(get(status + "/planner/decisions?moved=1"))["decisions"],
    "metrics": get(status + "/metrics"), "other": get(f"http://{planner}:9085/metrics"),
    "ready": json.loads(get(status + "/ready")),
}))
"""


def test_workers_come_with_the_load_and_go_with_it(tmp_path: Path) -> None:
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    for folder in ("t", "r"):
        (tmp_path / folder).mkdir()
    dynamo = Path(sys.executable).with_name("dynamo")
    env = {**os.environ, "TMPDIR": str(tmp_path / "t"), "XDG_RUNTIME_DIR": str(tmp_path / "r")}
    done = subprocess.run(
        [dynamo, "up", EXAMPLE, "--timeout", "90", "--exec", f"{sys.executable} {script}"],
        env=env, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    assert (seen["before"], seen["most"], seen["back"]) == (1, True, True)
    assert seen["answers"] == 180
    assert seen["ready"]["ready"], seen["ready"]
    moves = [
        (order["before"], order["replicas"], order["reason"])
        for told in reversed(seen["decisions"])
        for order in told["decision"]["orders"]
    ]
    assert all(1 <= replicas <= 4 for _, replicas, _ in moves)
    assert moves[0][0] == 1
    assert moves[-1][1] == 1
    assert "KV cache use is" in moves[0][2]
    assert 'dynamo_planner_orders_total{outcome="taken"}' in seen["metrics"]
    assert "dynamo_planner_gpu_hours" in seen["other"]
