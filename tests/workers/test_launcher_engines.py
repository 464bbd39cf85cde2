"""An engine's command line and environment, and what it says of itself when asked."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
from dynamo_kv_router import engine_metrics
from dynamo_workers import model_files
from dynamo_workers.engine_side import FOLDER, MIDDLEWARE, PREFILL_MIDDLEWARE
from dynamo_workers.engines import Arguments, BadArguments, Place, SimEngine
from dynamo_workers.readiness import judge
from dynamo_workers.settings import Settings
from dynamo_workers.tiny import TOKENIZER_FOLDER
from hypothesis import given
from hypothesis import strategies as st

PLACE = Place("127.0.7.1", 8000, "ipc:///t/events", "ipc:///t/replay", "ipc:///t/reports")


def flags(argv: list[str]) -> dict[str, str]:
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    return {one: two for one, two in pairs if one.startswith("--")}


@pytest.mark.parametrize(
    "line",
    [
        ["--model", "m", "--max-model-len", "512"],
        ["m", "--max-model-len=512"],
        ["--max_model_len", "512", "--model=m"],
        ["--model", "x", "--max-model-len", "1", "--model", "m", "--max-model-len", "512"],
    ],
)
def test_flags_are_found_in_every_spelling(line: list[str]) -> None:
    arguments = Arguments(line)
    assert arguments.value("--model") == "m"
    assert arguments.number("--max-model-len") == 512


def test_a_flag_with_several_values_and_a_negative_number() -> None:
    arguments = Arguments(["--served-model-name", "a", "b", "--seed", "-1", "--eager"])
    assert arguments.values("--served-model-name") == ["a", "b"]
    assert arguments.number("--seed") == -1
    assert arguments.has("--eager")
    assert arguments.values("--eager") == []
    with pytest.raises(BadArguments, match="--served-model-name: 'a' is not a whole number"):
        arguments.number("--served-model-name")


USES = (["--a"], ["--a=2"], ["--a", "x", "-1"], ["--b=1"], ["--c"], ["--c", "y"])


@given(st.lists(st.sampled_from(USES), max_size=8))
def test_removing_one_flag_leaves_the_others_as_they_were(uses: list[list[str]]) -> None:
    arguments = Arguments(["--first", *itertools.chain(*uses)])
    kept = {flag: arguments.values(flag) for flag in ("--first", "--b", "--c")}
    arguments.remove("--a")
    assert not arguments.has("--a")
    assert {flag: arguments.values(flag) for flag in kept} == kept


def test_the_engine_gets_the_pods_address_its_sockets_and_the_middleware_last() -> None:
    engine = SimEngine(["--middleware", "mine.Own", "--max-num-seqs", "4"], {}, 8000)
    argv = engine.argv(PLACE)
    assert argv[:3] == [sys.executable, "-m", "dynamo_workers.sim"]
    given = flags(argv)
    assert (given["--host"], given["--port"]) == ("127.0.7.1", "8000")
    assert given["--max-num-seqs"] == "4"
    assert json.loads(given["--kv-events-config"]) == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "ipc:///t/events",
        "replay_endpoint": "ipc:///t/replay",
    }
    at = [argv[i + 1] for i, one in enumerate(argv) if one == "--middleware"]
    assert at == ["mine.Own", MIDDLEWARE]
    env = engine.env(PLACE)
    assert env["DYN_ENGINE_REPORT_SOCKET"] == PLACE.reports
    assert env["PYTHONPATH"] == str(FOLDER)


def test_the_users_python_path_and_environment_stay() -> None:
    engine = SimEngine([], {"PYTHONPATH": "/mine", "A": "1"}, 8000)
    env = engine.env(PLACE)
    assert env["PYTHONPATH"] == f"{FOLDER}:/mine"
    assert env["A"] == "1"


def test_the_users_events_config_is_merged_and_what_is_overridden_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    line = [
        "--kv-events-config",
        '{"endpoint": "tcp://*:5557", "topic": "kv", "buffer_steps": 7}',
        "--kv-events-config.hwm",
        "50",
    ]
    given = json.loads(flags(SimEngine(line, {}, 8000).argv(PLACE))["--kv-events-config"])
    assert given["topic"] == "kv"
    assert given["buffer_steps"] == 7
    assert given["hwm"] == 50
    assert given["endpoint"] == PLACE.events
    assert "endpoint (was 'tcp://*:5557')" in caplog.text


ROLE_ENV = {"DYN_PD_SECRET": "0123456789abcdef", "POD_IP": "10.0.0.7"}


@pytest.mark.parametrize(
    ("role", "line", "config"),
    [
        ("prefill", [], {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}),
        (
            "decode",
            [],
            {
                "kv_connector": "NixlConnector",
                "kv_role": "kv_consumer",
                "kv_load_failure_policy": "recompute",
            },
        ),
        (
            "decode",
            ["--kv-transfer-config", '{"kv_role":"kv_both","kv_load_failure_policy":"fail"}'],
            {
                "kv_connector": "NixlConnector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "fail",
            },
        ),
    ],
)
def test_a_workers_role_completes_its_kv_transfer(
    role: str, line: list[str], config: dict[str, str]
) -> None:
    engine = SimEngine(line, {**ROLE_ENV, "DYN_COMPONENT_TYPE": role}, 8000)
    argv = engine.argv(PLACE)
    assert argv.count("--kv-transfer-config") == 1
    assert json.loads(flags(argv)["--kv-transfer-config"]) == config
    at = [argv[i + 1] for i, one in enumerate(argv) if one == "--middleware"]
    assert at == [PREFILL_MIDDLEWARE, MIDDLEWARE]
    assert engine.env(PLACE)["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.7"


def test_other_workers_transfer_what_their_user_says() -> None:
    line = ["--kv-transfer-config", '{"kv_connector":"LMCacheMP","kv_role":"kv_both"}']
    engine = SimEngine(line, {**ROLE_ENV, "DYN_COMPONENT_TYPE": "worker"}, 8000)
    argv = engine.argv(PLACE)
    assert argv[3:5] == line
    assert PREFILL_MIDDLEWARE not in argv
    assert "VLLM_NIXL_SIDE_CHANNEL_HOST" not in engine.env(PLACE)


def test_a_role_without_a_secret_says_so_and_one_too_short_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    SimEngine([], {"DYN_COMPONENT_TYPE": "decode"}, 8000)
    assert "no DYN_PD_SECRET or DYN_PD_SECRET_FILE" in caplog.text
    with pytest.raises(BadArguments, match="DYN_PD_SECRET: 3 bytes are too short"):
        SimEngine([], {"DYN_COMPONENT_TYPE": "decode", "DYN_PD_SECRET": "abc"}, 8000)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (["--port", "9000"], ["--port 9000", "8000", "DYN_HTTP_PORT=9000"]),
        (["--disable-log-stats"], ["--disable-log-stats", "remove it"]),
        (["--uds", "/s"], ["--uds"]),
        (["--headless"], ["--headless"]),
        (["--data-parallel-size", "2"], ["--data-parallel-size 2", "2 replicas"]),
        (["-dp", "4"], ["4 replicas"]),
        (["--data-parallel-size", "two"], ["--data-parallel-size", "'two'"]),
        (["--kv-events-config", "{"], ["--kv-events-config", "JSON"]),
        (["--num-workers", "3"], ["--num-workers", "replicas"]),
    ],
)
def test_a_line_that_cannot_work_is_refused_by_name(line: list[str], names: list[str]) -> None:
    with pytest.raises(BadArguments) as refused:
        SimEngine(line, {}, 8000)
    assert all(name in str(refused.value) for name in names)


def test_an_address_that_agrees_with_the_pod_is_no_error() -> None:
    argv = SimEngine(["--host", "0.0.0.0", "--port", "8000"], {}, 8000).argv(PLACE)
    assert argv.count("--port") == 1
    assert argv.count("--host") == 1


def test_a_line_for_dynamos_mocker_starts_the_simulated_engine() -> None:
    line = ["--model-path", "Q/W", "--model-name", "q", "--speedup-ratio", "2.0"]
    line += ["--planner-profile-data", "/p", "--disaggregation-mode", "prefill"]
    given = flags(SimEngine(line, {}, 8000).argv(PLACE))
    assert (given["--model"], given["--served-model-name"], given["--speed"]) == ("Q/W", "q", "2.0")
    assert "--disaggregation-mode" not in given
    assert "--planner-profile-data" not in given


def test_urls_of_wildcard_and_v6_addresses() -> None:
    assert Place("0.0.0.0", 1, "", "", "").url == "http://127.0.0.1:1"
    assert Place("::", 1, "", "", "").url == "http://[::1]:1"


# model files


def test_a_model_is_found_in_the_hub_cache_without_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    env = {"HF_HOME": str(tmp_path)}
    assert model_files.find_model("org/name", env=env) == snapshot
    assert model_files.find_model("org/name", "abc123", env=env) == snapshot
    assert model_files.find_model("org/name", "v2", env=env) is None
    assert model_files.find_model("org/other", env=env) is None
    assert model_files.find_model("org/name", cache=str(tmp_path / "hub")) == snapshot
    assert model_files.find_model(str(snapshot), env={}) == snapshot


def test_only_what_tokenizing_needs_is_served(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json", "model.safetensors", ".env"):
        (tmp_path / name).write_text(name)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("t")
    files = model_files.collect(tmp_path)
    assert set(files.digests) == {
        "tokenizer.json",
        "config.json",
        "additional_chat_templates/tools.jinja",
    }
    assert files.digests["config.json"] == hashlib.sha256(b"config.json").hexdigest()
    assert files.reason == ""


@pytest.mark.parametrize("inline", [False, True])
def test_the_chat_template_of_the_command_line_replaces_the_models(
    tmp_path: Path, inline: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TOKENIZER_FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pyc*"))
    (folder / "chat_template.jinja").write_text("the model's own")
    text = "{% for m in messages %}{{ m }}{% endfor %}"
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    engine = SimEngine(
        ["--model", str(folder), "--chat-template", text if inline else str(path)], {}, 8000
    )
    files, settings = engine.tokenizer(str(folder))
    assert files.digests["chat_template.jinja"] == hashlib.sha256(text.encode()).hexdigest()
    assert settings["chat_template"] == "chat_template.jinja"


def test_flags_that_change_rendering_are_told() -> None:
    line = ["--chat-template-content-format", "openai", "--trust-request-chat-template"]
    _, settings = SimEngine(line, {}, 8000).tokenizer("anything")
    assert settings == {
        "chat_template_content_format": "openai",
        "trust_request_chat_template": "true",
    }


def test_without_files_there_is_a_reason(tmp_path: Path) -> None:
    assert "no tokenizer.json" in model_files.collect(tmp_path).reason
    line = ["--chat-template", "template_chatml"]
    files, _ = SimEngine(line, {}, 8000).tokenizer("anything")
    assert files.digests == {}
    assert "template_chatml" in files.reason


# the engine's metrics page

PAGE = """# HELP vllm:num_requests_running Running
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:time_to_first_token_seconds_count{engine="0",model_name="tiny"} 17.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="tiny"} 17.0
vllm:cache_config_info{block_size="32",num_gpu_blocks="256",cache_dtype="a \\"b\\" c"} 1.0
"""


def test_the_few_figures_of_a_metrics_page() -> None:
    figures = engine_metrics.EngineFigures(3, 2, 0.25, 17.0, by_rank={0: 5})
    assert engine_metrics.figures(PAGE) == figures
    config = engine_metrics.cache_config(PAGE)
    assert (config["block_size"], config["num_gpu_blocks"]) == ("32", "256")
    assert engine_metrics.figures("# nothing\n") is None
    assert engine_metrics.cache_config("") == {}


# readiness and settings


@pytest.mark.parametrize(
    ("unhealthy", "seen", "waited", "ready", "reason"),
    [
        ("it answers 503", True, 100.0, False, "it answers 503"),
        ("", True, 0.0, True, ""),
        ("", False, 59.0, False, "waiting for a picker"),
        ("", False, 60.0, True, "no picker subscribed within 60 s"),
    ],
)
def test_ready_means_routable(
    unhealthy: str, seen: bool, waited: float, ready: bool, reason: str
) -> None:
    verdict = judge(unhealthy, picker_seen=seen, healthy_for_s=waited, without_picker_s=60.0)
    assert verdict.ready is ready
    assert verdict.reason.startswith(reason)
    assert verdict.without_picker is (ready and not seen)


def test_settings_come_from_the_pods_environment() -> None:
    settings = Settings.from_env(
        {"POD_NAME": "w-0", "DYN_SYSTEM_HOST": "127.0.7.1", "DYN_DRAIN_SECONDS": "2.5"}
    )
    assert settings.name == "w-0"
    assert settings.stream_address == "tcp://127.0.7.1:5557"
    assert settings.drain_s == 2.5
    assert Settings(system_host="::").stream_address == "tcp://[::]:5557"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DYN_HTTP_PORT", "http"),
        ("DYN_STREAM_PORT", "70000"),
        ("DYN_DRAIN_SECONDS", "-1"),
        ("DYN_READY_WITHOUT_PICKER_SECONDS", "never"),
        ("DYN_STOP_SECONDS", "inf"),
    ],
)
def test_a_bad_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(BadArguments, match=name):
        Settings.from_env({name: value})
