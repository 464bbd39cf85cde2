"""Ten thousand mixed requests through a real frontend; see `load/mixed.py` for what is compared."""

import subprocess
import sys
from pathlib import Path

import pytest

LOAD = Path(__file__).parent / "load"


@pytest.mark.timeout(900)
def test_no_byte_of_ten_thousand_requests_is_lost_doubled_or_cut(tmp_path: Path) -> None:
    digests = tmp_path / "digests"
    digests.mkdir()
    graph = tmp_path / "graph.yaml"
    graph.write_text(
        (LOAD / "graph.yaml")
        .read_text()
        .replace("PYTHONPATH_OF_THE_TEST", str(LOAD))
        .replace("DIGEST_LOG_OF_THE_TEST", str(digests))
    )
    run = subprocess.run(
        [
            sys.executable, "-m", "dynamo_cli.main", "up", str(graph),
            "--state-dir", str(tmp_path / "state"),
            "--exec", f"{sys.executable} {LOAD / 'mixed.py'} --requests 10000 --digests {digests}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stdout
    assert "problems: none" in run.stdout
