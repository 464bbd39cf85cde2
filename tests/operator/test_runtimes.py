"""What runs in a component: NVIDIA's programs mapped, stock engines kept, the rest said."""

from collections.abc import Callable
from typing import Any

import pytest
from dynamo_operator.render import Note, Platform
from dynamo_operator.render.flags import VLLM, translate
from dynamo_operator.render.notes import (
    CONNECTOR_UNSUPPORTED,
    ENGINE_BUILD,
    FLAGS_TRANSLATED,
    FRONTEND_SIDECAR_REPLACED,
    IMAGE_DEFAULTED,
    ROLE_CONFLICT,
    RUNTIME_MAPPED,
    RUNTIME_UNSUPPORTED,
    TYPE_INFERRED,
    Notes,
)
from dynamo_operator.render.runtimes import Family, Runtime, resolve
from dynamo_operator.render.shell import plain

NVIDIA = "nvcr.io/nvidia/ai-dynamo"
Found = tuple[Runtime, list[Note]]


def found(
    main: dict[str, Any], type: str = "worker", backend: str | None = None, **platform: Any
) -> Found:
    notes = Notes()
    settings = Platform(image_tag="test", **platform)
    return resolve("c", type, main, backend, settings, notes), notes.items


def reasons(result: Found) -> list[str]:
    return [note.reason for note in result[1]]


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (["python3", "-m", "dynamo.vllm"], ["--model", "m"]),
        (["python3"], ["-m", "dynamo.vllm", "--model", "m"]),
        (["/usr/bin/python3.12", "-u", "-m", "dynamo.vllm", "--model", "m"], None),
        (None, ["-m", "dynamo.vllm", "--model", "m"]),
    ],
)
def test_every_way_to_start_a_module_is_the_same(
    command: list[str] | None, args: list[str] | None
) -> None:
    main = {"image": f"{NVIDIA}/vllm-runtime:1.6.1", "command": command, "args": args}
    runtime, notes = found(main)
    assert runtime.image == "dynamo-platform/vllm:test"
    assert runtime.command == ["dynamo", "worker", "vllm"]
    assert runtime.args == ["--model", "m"]
    assert runtime.family is Family.LAUNCHER
    assert [note.reason for note in notes] == [RUNTIME_MAPPED]


@pytest.mark.parametrize(
    ("module", "image", "command"),
    [
        ("frontend", "frontend", ["dynamo", "frontend"]),
        ("vllm", "vllm", ["dynamo", "worker", "vllm"]),
        ("mocker", "worker", ["dynamo", "worker", "sim"]),
    ],
)
def test_the_module_decides_and_not_the_images_name(
    module: str, image: str, command: list[str]
) -> None:
    main = {"image": f"{NVIDIA}/dynamo-planner:1", "command": ["python3", "-m", f"dynamo.{module}"]}
    runtime, _ = found(main, "")
    assert runtime.image == f"dynamo-platform/{image}:test"
    assert runtime.command == command


@pytest.mark.parametrize("module", ["sglang", "trtllm", "global_planner", "global_router"])
def test_a_module_without_a_replacement_stays_as_written(module: str) -> None:
    main = {
        "image": f"{NVIDIA}/{module}-runtime:1",
        "command": ["python3", "-m", f"dynamo.{module}"],
        "args": ["--x", "--disaggregation-mode", "prefill"],
    }
    runtime, notes = found(main)
    assert (runtime.image, runtime.command, runtime.args) == tuple(main.values())
    assert runtime.family is Family.FOREIGN
    assert runtime.role == "prefill"
    assert [note.reason for note in notes] == [RUNTIME_UNSUPPORTED]


def test_an_image_from_elsewhere_stays_unless_its_prefix_is_mapped() -> None:
    main = {"image": "my-registry/vllm-runtime:1", "command": ["python3", "-m", "dynamo.vllm"]}
    runtime, notes = found(main)
    assert runtime.image == main["image"]
    assert [note.reason for note in notes] == [RUNTIME_UNSUPPORTED]
    mapped, _ = found(main, images={"my-registry/": "my-registry/dynamo-platform/"})
    assert mapped.image == "my-registry/dynamo-platform/vllm:test"


@pytest.mark.parametrize(
    ("image", "target", "is_plain"),
    [
        ("vllm-runtime:1.6.1", "vllm", True),
        ("vllm-runtime:1.6.1-rc2", "vllm", True),
        ("vllm-runtime:1.6.1-arm64", "vllm", True),
        ("vllm-runtime:my-tag", "vllm", True),
        ("vllm-runtime@sha256:00", "vllm", True),
        ("vllm-runtime:1.6.1-efa-amd64", "vllm", False),
        ("vllm-runtime:1.6.1-kimi-k3-dev.1", "vllm", False),
        ("vllm-runtime-xpu:my-tag", "vllm-xpu", False),
        ("vllm-runtime-xpu", "vllm-xpu", False),
        ("nemotron-vllm:latest", "vllm", False),
    ],
)
@pytest.mark.parametrize("command", [["python3", "-m", "dynamo.vllm"], ["vllm", "serve"]])
def test_another_build_of_the_engine_is_not_taken_for_the_plain_one(
    image: str, target: str, is_plain: bool, command: list[str]
) -> None:
    result = found({"image": f"{NVIDIA}/{image}", "command": command})
    assert result[0].image == f"dynamo-platform/{target}:test"
    assert result[0].own_image == "vllm"
    assert (ENGINE_BUILD in reasons(result)) is not is_plain
    beside, _ = found({"image": f"{NVIDIA}/{image}", "command": ["python3", "-m", "dynamo.mocker"]})
    assert beside.image == "dynamo-platform/worker:test"


def test_our_own_build_of_the_engine_stays_what_it_is() -> None:
    main = {"image": "r/dynamo-platform/vllm-xpu:7"}
    runtime, notes = found(main)
    assert (runtime.image, runtime.own_image, notes) == (main["image"], "vllm", [])
    other, _ = found({**main, "command": ["python3", "-m", "dynamo.frontend"]})
    assert other.image == "r/dynamo-platform/frontend:7"
    bare, _ = found({"image": "dynamo-platform/vllm-xpu"}, own_prefix="r/dynamo-platform/")
    assert bare.image == "r/dynamo-platform/vllm-xpu:test"


@pytest.mark.parametrize("written", [["--load-format", "gms"], ["--load-format=gms"]])
def test_weights_that_another_process_holds_are_loaded_here(written: list[str]) -> None:
    image = f"{NVIDIA}/vllm-runtime:1.6.1"
    runtime, notes = found({"image": image, "args": ["--model", "m", *written, "--seed", "1"]})
    assert runtime.args == ["--model", "m", "--seed", "1"]
    assert "dropped --load-format gms" in notes[-1].message
    other = ["--model", "m", *(word.replace("gms", "safetensors") for word in written)]
    assert found({"image": image, "args": other})[0].args == other


def test_the_longest_prefix_wins() -> None:
    platform = Platform(images={"a/": "one/", "a/b/": "two/"})
    assert platform.replacement_prefix("a/b/c:1") == "two/"
    assert platform.replacement_prefix("a/c:1") == "one/"
    assert platform.replacement_prefix("b/c:1") is None


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("frontend", ["dynamo", "frontend"]),
        ("worker", ["dynamo", "worker", "sim"]),
        ("vllm", ["dynamo", "worker", "vllm"]),
    ],
)
def test_our_images_run_their_program_by_default(name: str, command: list[str]) -> None:
    image = f"registry.example:5000/x/dynamo-platform/{name}@sha256:00"
    runtime, notes = found({"image": image, "args": ["--disaggregation-mode", "x"]})
    assert runtime.image == image
    assert runtime.command == command
    assert runtime.args == ["--disaggregation-mode", "x"]
    assert notes == []


@pytest.mark.parametrize(
    ("type", "image", "program"),
    [
        ("frontend", f"{NVIDIA}/sglang-runtime:1", "dynamo-platform/frontend:test"),
        ("epp", f"{NVIDIA}/dynamo-frontend:1", "dynamo-platform/epp:test"),
        ("prefill", f"{NVIDIA}/vllm-runtime:1", "dynamo-platform/vllm:test"),
        ("worker", None, "dynamo-platform/vllm:test"),
        ("planner", None, "dynamo-platform/planner:test"),
    ],
)
def test_without_a_command_the_type_decides(type: str, image: str | None, program: str) -> None:
    result = found({"image": image, "args": ["--a"]}, type)
    assert result[0].image == program
    assert result[0].args == ["--a"]
    assert (RUNTIME_MAPPED if image else IMAGE_DEFAULTED) in reasons(result)


def test_a_dynamo_module_in_our_image_is_replaced_too() -> None:
    image = "r/dynamo-platform/vllm:7"
    runtime, notes = found({"image": image, "command": ["python3", "-m", "dynamo.frontend"]})
    assert runtime.image == "r/dynamo-platform/frontend:7"
    assert runtime.command == ["dynamo", "frontend"]
    same, more = found({"image": image, "command": ["python3", "-m", "dynamo.vllm"]})
    assert same.image == image
    assert [note.reason for note in notes + more] == [RUNTIME_MAPPED, RUNTIME_MAPPED]


def test_another_engines_worker_without_image_runs_nothing_of_ours() -> None:
    runtime, notes = found({}, "worker", "sglang")
    assert runtime.image is None
    assert [note.reason for note in notes] == [RUNTIME_UNSUPPORTED]


@pytest.mark.parametrize(
    "main",
    [
        {"image": "vllm/vllm-openai:v0.26.0", "args": ["--model", "m"]},
        {"image": "x/engine:1", "command": ["vllm", "serve", "m"]},
        {"image": "x/engine:1", "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"]},
        {"image": "x/engine:1", "command": ["sh", "-c", "cd /m && exec vllm serve m --port 8000"]},
    ],
)
def test_a_stock_engine_runs_as_it_is(main: dict[str, Any]) -> None:
    runtime, notes = found(main)
    assert runtime.family is Family.STOCK
    assert runtime.image == main["image"]
    assert runtime.command == main.get("command")
    assert notes == []


def test_our_launcher_is_known_in_any_image() -> None:
    for command in (["dynamo", "worker", "sim"], ["sh", "-c", "exec dynamo worker vllm --model m"]):
        runtime, notes = found({"image": "x/y:1", "command": command})
        assert runtime.family is Family.LAUNCHER
        assert notes == []


def test_a_script_is_rewritten_in_place() -> None:
    main = {
        "image": f"{NVIDIA}/vllm-runtime:1",
        "command": ["/bin/bash", "-lc"],
        "args": [
            'ulimit -l unlimited\nexec python3 -m dynamo.vllm --model "$M" --is-prefill-worker'
        ],
    }
    runtime, notes = found(main)
    assert runtime.command == ["/bin/bash", "-lc"]
    assert runtime.args == ['ulimit -l unlimited\nexec dynamo worker vllm --model "$M"']
    assert runtime.role == "prefill"
    assert [note.reason for note in notes] == [RUNTIME_MAPPED, FLAGS_TRANSLATED]
    assert "--is-prefill-worker" in notes[1].message


def test_a_script_that_can_not_be_read_for_sure_stays_as_written() -> None:
    main = {
        "image": f"{NVIDIA}/vllm-runtime:1",
        "command": ["/bin/sh", "-c", "python3 -m dynamo.vllm --disaggregation-mode decode | tee l"],
    }
    runtime, notes = found(main)
    assert runtime.command == main["command"]
    assert runtime.role == "decode"
    assert runtime.type == "worker"
    assert [note.reason for note in notes] == [RUNTIME_UNSUPPORTED]


def test_a_mode_without_a_role_is_unsupported() -> None:
    main = {
        "image": f"{NVIDIA}/vllm-runtime:1",
        "command": ["python3", "-m", "dynamo.vllm", "--disaggregation-mode", "encode"],
    }
    assert reasons(found(main)) == [RUNTIME_UNSUPPORTED]


def test_connectors_of_dynamos_block_manager_are_said() -> None:
    main = {
        "image": f"{NVIDIA}/vllm-runtime:1",
        "command": ["python3", "-m", "dynamo.vllm"],
        "args": ["--kv-transfer-config", '{"kv_connector":"DynamoConnector"}'],
    }
    assert CONNECTOR_UNSUPPORTED in reasons(found(main))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--model", "m", "--seed", "1"], ["--model", "m", "--seed", "1"]),
        (["--namespace", "x", "--model", "m"], ["--model", "m"]),
        (["--namespace=x", "--model=m"], ["--model=m"]),
        (["--disaggregation_mode", "prefill"], []),
        (["--custom-jinja-template", "t"], ["--chat-template", "t"]),
        (["--custom-jinja-template=t"], ["--chat-template=t"]),
        (["--dyn-tool-call-parser", "harmony"],
         ["--enable-auto-tool-choice", "--tool-call-parser", "openai"]),
        (["--dyn-tool-call-parser", "nobody"], []),
        (["--dyn-reasoning-parser=qwen3"], ["--reasoning-parser", "qwen3"]),
        (["--dyn-reasoning-parser", "qwen3", "--reasoning-parser", "x"],
         ["--reasoning-parser", "x"]),
        (["--enable-multimodal", "--model", "m"], ["--model", "m"]),
        (["--namespace"], []),
        (["m", "-tp", "2"], ["m", "-tp", "2"]),
    ],
)  # fmt: skip
def test_flags(given: list[str], expected: list[str]) -> None:
    words = translate([plain(word) for word in given], VLLM).words
    assert [word.raw for word in words] == expected


View = Callable[..., Any]


def test_roles_come_from_the_type_then_from_the_flags(one: View) -> None:
    image = "dynamo-platform/vllm:1"
    mapped = {"image": f"{NVIDIA}/vllm-runtime:1", "command": ["python3", "-m", "dynamo.vllm"]}
    by_flag = one({**mapped, "args": ["--disaggregation-mode", "prefill"]})
    labels = by_flag.template["metadata"]["labels"]
    assert labels["nvidia.com/dynamo-component-type"] == "prefill"
    assert labels["nvidia.com/dynamo-component-class"] == "worker"
    conflict = one({**mapped, "args": ["--disaggregation-mode", "prefill"]}, type="decode")
    labels = conflict.template["metadata"]["labels"]
    assert labels["nvidia.com/dynamo-component-type"] == "decode"
    assert ROLE_CONFLICT in conflict.reasons
    assert one({"image": image}).env["DYN_COMPONENT_TYPE"] == "worker"


def test_a_component_without_type_is_what_it_runs(one: View) -> None:
    view = one({"image": "dynamo-platform/frontend:1"}, type=None)
    assert view.env["DYN_COMPONENT_TYPE"] == "frontend"
    assert view.reasons == [TYPE_INFERRED]
    other = one({"image": "x/y:1", "command": ["serve"]}, type=None)
    assert other.ports == {}
    assert "livenessProbe" not in other.main
    assert other.objects("Service") == []


def test_frontends_beside_engines_are_left_out(one: View) -> None:
    sidecar = {"name": "fe", "image": "x/y:1"}
    logger = {"name": "logger", "image": "x/y:1"}
    view = one(
        {"image": "dynamo-platform/vllm:1"},
        pod={"containers": [sidecar, logger]},
        frontendSidecar="fe",
    )
    assert [c["name"] for c in view.pod["containers"]] == ["main", "logger"]
    assert view.reasons == [FRONTEND_SIDECAR_REPLACED]
