"""Envoy's configuration: reviewed as a golden file, accepted by Envoy itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from dynamo_epp.frontend import FrontendSettings, bootstrap, write_eds
from dynamo_epp.frontend.bootstrap import Sockets, dump
from dynamo_epp.frontend.envoy import find_envoy
from dynamo_runtime.discovery import Endpoint

GOLDEN = Path(__file__).parent / "golden" / "envoy.json"

REVIEWED = FrontendSettings(concurrency=1, decision_header=True)


def test_golden() -> None:
    """``UPDATE_GOLDEN=1`` rewrites the file; look at the difference before committing it."""
    text = dump(bootstrap(REVIEWED, Sockets(Path("/run/frontend"))))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize(
    "settings",
    [
        FrontendSettings(),
        FrontendSettings(decision_header=True, retries=0, http_host="::", status_host="::"),
        FrontendSettings(http_host="127.0.0.1", body_limit=1, stream_idle_timeout=0.5),
    ],
)
def test_envoy_accepts_it(settings: FrontendSettings, tmp_path: Path) -> None:
    sockets = Sockets(tmp_path)
    sockets.bootstrap.write_text(dump(bootstrap(settings, sockets)))
    write_eds(sockets.eds, [])
    done = subprocess.run(
        [find_envoy(), "--mode", "validate", "--config-path", sockets.bootstrap],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # What is deprecated stops working one day, without an error of ours.
    assert "deprecated" not in done.stderr.lower()


def test_write_eds(tmp_path: Path) -> None:
    path = tmp_path / "eds.json"
    endpoints = [
        Endpoint(name="b", address="10.0.0.2", port=8000, ready=False),
        Endpoint(name="a", address="10.0.0.1", port=8000, ready=True),
        Endpoint(name="same-address", address="10.0.0.1", port=8000, terminating=True),
        Endpoint(name="no-address-yet", address="", port=8000),
    ]
    write_eds(path, endpoints)
    (resource,) = json.loads(path.read_text())["resources"]
    addresses = [
        tuple(member["endpoint"]["address"]["socket_address"].values())
        for member in resource["endpoints"][0]["lb_endpoints"]
    ]
    assert addresses == [("10.0.0.1", 8000), ("10.0.0.2", 8000)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["eds.json"]
