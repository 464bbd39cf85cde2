"""What the operator counts on in vLLM's image, which is too large to be built for a test."""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.images.test_containerfiles import stages

IMAGES = Path(__file__).resolve().parents[2] / "images"
FOLDER = "/opt/vllm"
"""The engine's environment, in the image and where its packages are mounted."""


def variables(stage: list[str]) -> dict[str, str]:
    """What a stage's ENV instructions set."""
    words = [word for line in stage if line.startswith("ENV ") for word in shlex.split(line)[1:]]
    return dict(word.split("=", 1) for word in words)


def test_the_engine_lies_beside_the_worker() -> None:
    """The worker's image goes on as it is: its user, its entry point, its Python."""
    engine, mounted, last = stages(IMAGES / "vllm.Containerfile")
    assert mounted[0] == "FROM ${WORKER} AS mounted"
    assert last == ["FROM mounted", f"COPY --from=engine {FOLDER} {FOLDER}"]
    for stage in (engine, mounted):
        assert any(f"-m venv --without-pip {FOLDER}" in line for line in stage)
    assert not any(line.startswith(("ENTRYPOINT", "CMD", "WORKDIR")) for line in mounted)
    assert mounted.index("USER 65532:65532") > mounted.index("USER 0")
    worker = stages(IMAGES / "Containerfile")[-1]
    assert worker[-1] == 'ENTRYPOINT ["dynamo"]'


def test_the_launcher_and_nodes_without_a_server_find_the_engine() -> None:
    """The launcher by its variable; `vllm serve --headless` by the path, in which the worker's own
    programs come first."""
    _, mounted, _ = stages(IMAGES / "vllm.Containerfile")
    found = variables(mounted)
    assert found["DYN_VLLM_PYTHON"] == f"{FOLDER}/bin/python"
    worker = variables(stages(IMAGES / "Containerfile")[-1])["PATH"].split(":")
    path = found["PATH"].split(":")
    assert path == [worker[0], f"{FOLDER}/bin", *worker[1:]]
