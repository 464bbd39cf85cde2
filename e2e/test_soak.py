"""Ten minutes of mixed load while workers are killed; leaves a dated report. See `load/soak.py`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOAD = Path(__file__).parent / "load"
REPORTS = Path(__file__).parent.parent / "docs" / "reports"
GRAPH = """
apiVersion: nvidia.com/v1beta1
kind: DynamoGraphDeployment
metadata: {name: soak}
spec:
  components:
    - name: Frontend
      type: frontend
      podTemplate: {spec: {containers: [{name: main, image: dynamo-platform/frontend}]}}
    - name: Worker
      type: worker
      replicas: 4
      podTemplate:
        spec:
          containers:
            - name: main
              image: dynamo-platform/worker
              args: [--served-model-name=tiny, --speed=20, --log-level=warning]
"""


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_nothing_breaks_but_what_was_killed(tmp_path: Path) -> None:
    graph = tmp_path / "graph.yaml"
    graph.write_text(GRAPH)
    seconds = os.environ.get("SOAK_SECONDS", "600")
    report = REPORTS / f"{time.strftime('%Y-%m-%d')}-soak.md"
    script = f"{sys.executable} {LOAD / 'soak.py'} --seconds {seconds} --report {report}"
    run = subprocess.run(
        [
            sys.executable, "-m", "dynamo_cli.main", "up", str(graph),
            "--state-dir", str(tmp_path / "state"), "--exec", script,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=float(seconds) + 600,
        check=False,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stdout
