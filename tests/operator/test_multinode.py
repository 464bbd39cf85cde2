"""Engines over several nodes: which node runs what, and how the others find the first."""

from collections.abc import Callable
from typing import Any

import pytest
from dynamo_operator.render import Platform, Rendered, render_with_notes
from dynamo_operator.render.multinode.commandline import CommandLine

NVIDIA = "nvcr.io/nvidia/ai-dynamo"
CLASS = "nvidia.com/dynamo-component-class"
LEADER = "$(LWS_LEADER_ADDRESS)"
Build = Callable[..., Any]


class Nodes:
    """A rendered group, easy to look at."""

    def __init__(self, rendered: Rendered) -> None:
        [self.object] = [m for m in rendered.manifests if m["kind"] == "LeaderWorkerSet"]
        self.spec = self.object["spec"]
        group = self.spec["leaderWorkerTemplate"]
        self.templates = {n: group[f"{n}Template"] for n in ("leader", "worker")}
        self.leader, self.worker = (
            next(c for c in t["spec"]["containers"] if c["name"] == "main")
            for t in self.templates.values()
        )
        self.services = [m for m in rendered.manifests if m["kind"] == "Service"]
        self.reasons = [note.reason for note in rendered.notes]
        self.labels = {n: t["metadata"]["labels"] for n, t in self.templates.items()}
        self.waits = [
            container["command"][-1]
            for container in self.templates["worker"]["spec"].get("initContainers", [])
        ]


@pytest.fixture
def nodes(graph: Build, platform: Platform) -> Build:
    """Renders a component of two nodes with eight GPUs each."""

    def build(
        command: list[str] | None = None,
        args: list[str] | None = None,
        image: str = "dynamo-platform/vllm:1",
        count: int = 2,
        gpus: int | None = 8,
        annotations: dict[str, str] | None = None,
        env: list[dict[str, str]] | None = None,
        **component: Any,
    ) -> Nodes:
        main: dict[str, Any] = {"name": "main", "image": image, "env": env or []}
        main |= {k: v for k, v in (("command", command), ("args", args)) if v is not None}
        if gpus:
            main["resources"] = {"limits": {"nvidia.com/gpu": str(gpus)}}
        template = {
            "metadata": {"annotations": annotations or {}},
            "spec": {"containers": [main, {"name": "logger", "image": "x"}]},
        }
        described = {
            "name": "W",
            "type": "worker",
            "multinode": {"nodeCount": count},
            "podTemplate": template,
            **component,
        }
        return Nodes(render_with_notes(graph(described), platform))

    return build


def test_a_group_lives_and_dies_as_a_whole(nodes: Build) -> None:
    found = nodes(args=["--model", "m", "-tp", "16"], count=4, replicas=3)
    assert found.object["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    worker_hash = found.labels["leader"]["nvidia.com/dynamo-worker-hash"]
    assert found.object["metadata"]["name"] == f"g-w-group-{worker_hash}"
    assert found.spec["replicas"] == 3
    assert found.spec["leaderWorkerTemplate"]["size"] == 4
    assert found.spec["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert found.spec["startupPolicy"] == "LeaderCreated"
    assert found.spec["rolloutStrategy"] == {"type": "RollingUpdate"}


def test_a_groups_rollout_is_bounded_by_annotations(nodes: Build) -> None:
    annotations = {
        "nvidia.com/deployment-rolling-update-max-surge": "1",
        "nvidia.com/deployment-rolling-update-max-unavailable": "0",
    }
    found = nodes(args=["--model", "m", "-tp", "16"], annotations=annotations)
    assert found.spec["rolloutStrategy"]["rollingUpdateConfiguration"] == {
        "maxSurge": 1,
        "maxUnavailable": 0,
    }


def test_an_engine_larger_than_a_node_is_spread_by_torch_distributed(nodes: Build) -> None:
    found = nodes(args=["--model", "org/m", "--tensor-parallel-size=16", "--seed", "1"])
    common = [
        *("--distributed-executor-backend", "mp", "--nnodes", "2"),
        *("--master-addr", LEADER, "--master-port", "29500"),
    ]
    sizes = ["--tensor-parallel-size=16", "--seed", "1"]
    assert found.leader["command"] == ["dynamo", "worker", "vllm"]
    assert found.leader["args"] == ["--model", "org/m", *sizes, *common, "--node-rank", "0"]
    assert found.worker["command"] == ["vllm", "serve"]
    rank = ["--node-rank", "$(LWS_WORKER_INDEX)", "--headless"]
    assert found.worker["args"] == ["org/m", *sizes, *common, *rank]
    assert found.waits == ["29500"]
    for main in (found.leader, found.worker):
        fields = [e["name"] for e in main["env"] if e.get("valueFrom")]
        assert "VLLM_NIXL_SIDE_CHANNEL_HOST" in fields


def test_requests_come_to_the_leader_alone(nodes: Build) -> None:
    found = nodes(args=["--model", "m", "-tp", "16"])
    assert "readinessProbe" in found.leader
    assert not {key for key in found.worker if key.endswith("Probe")}
    assert found.labels["leader"][CLASS] == "worker"
    assert CLASS not in found.labels["worker"]
    assert "nvidia.com/metrics-enabled" not in found.labels["worker"]
    [service] = found.services
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    assert service["metadata"]["name"] != found.object["metadata"]["name"]


def test_ray_spreads_it_where_an_annotation_says_so(nodes: Build) -> None:
    found = nodes(
        args=["--model", "a b", "-tp", "8", "-pp", "2"],
        annotations={"nvidia.com/vllm-distributed-executor-backend": "ray"},
    )
    assert found.leader["command"] == ["sh", "-c"]
    first, last = found.leader["args"][0].splitlines()
    assert first.startswith("ray start --head --port=6379")
    assert last == (
        "exec dynamo worker vllm --model 'a b' -tp 8 -pp 2 --distributed-executor-backend ray"
    )
    assert found.worker["args"] == [f"exec ray start --address={LEADER}:6379 --block"]
    assert found.waits == ["6379"]


def test_data_parallel_ranks_are_dealt_out_and_every_node_serves(nodes: Build) -> None:
    found = nodes(["vllm", "serve", "m"], ["-dp", "8", "-tp", "2"], image="vllm/vllm-openai:v1")
    ranks = ["--data-parallel-hybrid-lb", "--data-parallel-size-local", "4"]
    assert found.leader["args"][:8] == ["m", "-dp", "8", "-tp", "2", *ranks]
    assert found.leader["args"][8:10] == ["--data-parallel-start-rank", "0"]
    assert "--data-parallel-start-rank $((4*LWS_WORKER_INDEX)) " in found.worker["args"][0]
    assert found.labels["worker"] == found.labels["leader"]
    assert found.worker["readinessProbe"] == found.leader["readinessProbe"]
    [service] = found.services
    assert "leaderworkerset.sigs.k8s.io/worker-index" not in service["spec"]["selector"]
    assert found.waits == []


def test_ranks_under_our_launcher_are_said_not_to_run(nodes: Build) -> None:
    found = nodes(args=["--model", "m", "-dp", "16"])
    assert "RuntimeUnsupported" in found.reasons


def test_what_fits_one_node_is_said(nodes: Build) -> None:
    found = nodes(args=["--model", "m", "-tp", "8"])
    assert found.leader == found.worker
    assert found.reasons == ["MultinodeFitsOneNode"]


def test_flags_that_the_author_gave_stay(nodes: Build) -> None:
    given = ["--model", "m", "-tp", "2", "--nnodes", "2", "--node-rank", "$(DYNAMO_RANK)"]
    found = nodes(args=given, gpus=1)
    assert found.leader["args"][: len(given)] == given
    assert found.leader["args"].count("--node-rank") == 1
    assert found.worker["args"].count("--node-rank") == 1
    assert found.worker["args"].count("--nnodes") == 1


def test_the_place_in_the_group_has_portable_names(nodes: Build) -> None:
    env = [{"name": "DYNAMO_RANK", "value": "7"}, {"name": "X", "value": "$(DYNAMO_RANK)"}]
    found = nodes(args=["--model", "m", "-tp", "16"], env=env)
    for main in (found.leader, found.worker):
        names = [entry["name"] for entry in main["env"]]
        values = {entry["name"]: entry.get("value") for entry in main["env"]}
        assert values["DYNAMO_RANK"] == "$(LWS_WORKER_INDEX)"
        assert values["DYNAMO_LEADER_ADDRESS"] == LEADER
        assert names.index("DYNAMO_RANK") < names.index("X")


def test_a_mapped_script_gets_the_flags_at_its_end(nodes: Build) -> None:
    script = 'ulimit -l unlimited\npython3 -m dynamo.vllm \\\n  --model "$M" -tp 16\n'
    found = nodes(["bash", "-c"], [script], image=f"{NVIDIA}/vllm-runtime:1")
    leader, worker = found.leader["args"][0], found.worker["args"][0]
    assert leader.startswith('ulimit -l unlimited\nexec dynamo worker vllm --model "$M" -tp 16 --d')
    assert leader.endswith("--node-rank 0")
    assert worker.startswith('ulimit -l unlimited\nexec vllm serve "$M" -tp 16 --d')
    assert worker.endswith("--node-rank '$(LWS_WORKER_INDEX)' --headless")


def test_sglang_is_told_its_rank(nodes: Build) -> None:
    found = nodes(
        ["python3", "-m", "dynamo.sglang"], ["--tp", "16"], image=f"{NVIDIA}/sglang-runtime:1"
    )
    common = ["--tp", "16", "--dist-init-addr", f"{LEADER}:29500", "--nnodes", "2", "--node-rank"]
    assert found.leader["args"] == ["-m", "dynamo.sglang", *common, "0"][2:]
    assert found.worker["args"] == [*common, "$(LWS_WORKER_INDEX)"]
    assert "readinessProbe" not in found.worker


def test_tensorrt_llm_starts_over_ssh(nodes: Build) -> None:
    found = nodes(
        ["python3", "-m", "dynamo.trtllm"],
        ["--model-path", "m"],
        image=f"{NVIDIA}/tensorrtllm-runtime:1",
        env=[{"name": "MINE", "value": "1"}],
    )
    [leader] = found.leader["args"]
    assert " -n 16 " in leader
    assert " -x MINE " in leader
    assert " -x POD_NAME " not in leader
    assert "'trtllm-llmapi-launch python3 -m dynamo.trtllm --model-path m'" in leader
    assert "sshd -D" in found.worker["args"][0]
    assert found.worker["readinessProbe"]["tcpSocket"] == {"port": 2222}
    for template in found.templates.values():
        volumes = [volume["name"] for volume in template["spec"]["volumes"]]
        assert "mpi-run-ssh-secret" in volumes
    assert "MultinodeNeedsSecret" in found.reasons


def test_a_simulated_engine_needs_no_flags(nodes: Build) -> None:
    found = nodes(args=["--model", "m"], image="dynamo-platform/worker:1", gpus=None)
    assert found.leader["command"] == found.worker["command"] == ["dynamo", "worker", "sim"]
    assert CLASS not in found.labels["worker"]


def test_what_can_not_be_read_runs_everywhere_as_written(nodes: Build) -> None:
    script = ["bash", "-c", "python3 -m dynamo.sglang --tp 16 | tee log"]
    found = nodes(script, image=f"{NVIDIA}/sglang-runtime:1")
    assert found.leader["command"] == script
    assert found.reasons.count("RuntimeUnsupported") == 2


def test_without_leader_worker_sets_the_component_is_left_out(graph: Build) -> None:
    large = {"name": "W", "type": "worker", "multinode": {}, "scalingAdapter": {}}
    other = {"name": "F", "type": "frontend"}
    platform = Platform(image_tag="test", apis=frozenset())
    rendered = render_with_notes(graph(large, other), platform)
    assert "MultinodeNeedsLeaderWorkerSet" in [note.reason for note in rendered.notes]
    components = {m["metadata"]["labels"].get("nvidia.com/dynamo-component")
                  for m in rendered.manifests}  # fmt: skip
    assert components == {"F"}
    assert [(c.name, c.workload_kind, c.workload) for c in rendered.components] == [
        ("W", "", ""),
        ("F", "Deployment", "g-f"),
    ]


def test_generations_of_groups_have_the_hash_in_their_names(
    graph: Build, platform: Platform
) -> None:
    def large(name: str, role: str) -> dict[str, Any]:
        main = {"name": "main", "image": "dynamo-platform/vllm:1", "args": ["-tp", "2"]}
        template = {"spec": {"containers": [main]}}
        return {"name": name, "type": role, "multinode": {}, "podTemplate": template}

    long = "x" * 60
    rendered = render_with_notes(
        graph(large(f"{long}p", "prefill"), large(f"{long}d", "decode")), platform
    )
    sets = [m for m in rendered.manifests if m["kind"] == "LeaderWorkerSet"]
    assert len({m["metadata"]["name"] for m in sets}) == 2
    for found, component in zip(sets, rendered.components, strict=True):
        assert found["metadata"]["name"] == component.workload
        assert component.workload.endswith(f"-group-{rendered.worker_hash}")
        assert len(component.workload) <= 48
        for template in ("leaderTemplate", "workerTemplate"):
            labels = found["spec"]["leaderWorkerTemplate"][template]["metadata"]["labels"]
            assert component.selector.items() <= labels.items()


@pytest.mark.parametrize(
    ("command", "args", "program", "words"),
    [
        (["python3", "-u", "-m", "a.b"], ["--x"], "python3 -u -m a.b", ["--x"]),
        ([], ["--x"], "", ["--x"]),
        (["/bin/sh", "-c", "A=1 exec vllm serve m --y 'a b'"], None, "vllm serve",
         ["m", "--y", "'a b'"]),
    ],
)  # fmt: skip
def test_a_command_line_taken_apart(
    command: list[str], args: list[str] | None, program: str, words: list[str]
) -> None:
    line = CommandLine.of({"command": command, "args": args})
    assert line is not None
    assert " ".join(word.raw for word in line.program) == program
    assert [word.raw for word in line.words] == words


@pytest.mark.parametrize(
    "command",
    [["run", "it"], ["sh", "-c", "a; b"], ["sh", "-c", "vllm serve m", "x"], ["sh"],
     ["python3 -m x"]],
)  # fmt: skip
def test_a_command_line_that_can_not_be_told(command: list[str]) -> None:
    assert CommandLine.of({"command": command}) is None


def test_the_last_value_of_a_flag_counts() -> None:
    line = CommandLine.of({"args": ["-tp", "2", "--tensor_parallel_size=4", "-pp", "x", "-dp"]})
    assert line is not None
    assert line.number("--tensor-parallel-size", "-tp") == 4
    assert line.number("-pp") == line.number("-dp") == line.number("-q") == 1
