"""The example with prefill and decode workers, run as users run it: real Envoy, picker and engines
(simulated) as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "prefill-decode.yaml"

ASK = """
import json, os, sys, time, urllib.request

def get(url, body=None):
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.headers.get("x-request-id"), answer.read().decode()

front = os.environ["DYNAMO_URL"]
status = front.rpartition(":")[0] + ":9090"
words = " ".join(f"word{n}" for n in range(300))

def ask(**more):
    body = {"model": "tiny", "messages": [{"role": "user", "content": words}], "max_tokens": 6}
    request_id, text = get(front + "/v1/chat/completions", json.dumps({**body, **more}).encode())
    deadline = time.monotonic() + 10
    while True:  # until everybody has told how it went
        found = json.loads(get(f"{status}/debug/decisions?request_id={request_id}")[1])
        outcome = found["decisions"][0]["outcome"]
        workers = json.loads(get(f"{status}/debug/workers")[1])["workers"]
        busy = any(worker["active_requests"] for worker in workers)
        told = {"status", "prefill_s"} <= outcome.keys() and not busy
        if told or time.monotonic() > deadline:
            return {"text": text, "decision": found["decisions"][0]}
        time.sleep(0.05)

asked = [ask(), ask(), ask(stream=True), ask(kv_transfer_params={"do_remote_prefill": True})]
state = json.loads(get(f"{status}/debug/workers")[1])["workers"]
pages = {w["name"]: get("http://" + w["endpoint"] + "/metrics")[1] for w in state}
print(json.dumps({"asked": asked, "roles": {w["name"]: w["role"] for w in state},
                  "pages": pages, "picker": get(f"{status}/metrics")[1]}))
"""


def sample(page: str, name: str, **labels: str) -> float:
    return sum(
        one.value
        for family in text_string_to_metric_families(page)
        for one in family.samples
        if one.name == name and labels.items() <= one.labels.items()
    )


def test_a_prompt_is_computed_by_one_worker_and_answered_by_another(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    for folder in ("t", "r"):
        (tmp_path / folder).mkdir()
    dynamo = Path(sys.executable).with_name("dynamo")
    env = {**os.environ, "TMPDIR": str(tmp_path / "t"), "XDG_RUNTIME_DIR": str(tmp_path / "r")}
    done = subprocess.run(
        [dynamo, "up", EXAMPLE, "--timeout", "90", "--exec", f"{sys.executable} {script}"],
        env=env, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    first, second, streamed, meddling = seen["asked"]
    roles = seen["roles"]

    answers = {
        json.loads(one["text"])["choices"][0]["message"]["content"] for one in (first, second)
    }
    assert len(answers) == 1
    for asked in seen["asked"]:
        decision = asked["decision"]
        assert decision["disagg"]["decision"] == "prefill-decode"
        assert roles[decision["outcome"]["prefilled_by"]] == "prefill"
        assert roles[decision["candidates"][0]["name"]] == "decode"
        assert decision["outcome"]["status"] == 200
    assert '"kv_transfer_params":null' in meddling["text"]
    assert streamed["text"].endswith("data: [DONE]\n\n")

    # What was computed and what was transferred is cached on both sides, and known.
    blocks = second["decision"]["blocks"]
    assert second["decision"]["candidates"][0]["overlap_blocks"] == blocks - 1
    assert second["decision"]["disagg"]["candidates"][0]["overlap_blocks"] == blocks - 1
    assert second["decision"]["outcome"]["prefill_cached_tokens"] >= 16 * (blocks - 1)

    source = "vllm:prompt_tokens_by_source_total"
    decoders = [page for name, page in seen["pages"].items() if roles[name] == "decode"]
    external = sum(sample(page, source, source="external_kv_transfer") for page in decoders)
    computed = sum(sample(page, source, source="local_compute") for page in decoders)
    assert external > 16 * (blocks - 1)
    assert computed == 4  # of each prompt its last token
    name, labels = "dynamo_epp_disagg_decisions_total", {"decision": "prefill-decode"}
    assert sample(seen["picker"], name, **labels) == 4
