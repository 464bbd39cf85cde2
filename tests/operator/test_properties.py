"""What holds for every graph: deterministic, total, and nothing that its author wrote is lost."""

import copy
from collections.abc import Iterator
from typing import Any

from dynamo_crds.v1beta1 import DynamoGraphDeployment
from dynamo_operator.render import Platform, render_with_notes
from dynamo_operator.render.text import to_json
from hypothesis import given, settings
from hypothesis import strategies as st

NVIDIA = "nvcr.io/nvidia/ai-dynamo"
PLATFORM = Platform(image_tag="test")

REPLACED = {"image", "command", "args"}
"""Fields of `main` that a mapped program replaces, and that several nodes add flags to."""

RESERVED = {
    f"nvidia.com/dynamo-{name}"
    for name in (
        "graph-deployment-name",
        "component",
        "component-type",
        "component-class",
        "worker-hash",
    )
}

word = st.sampled_from(["a", "b", "c", "main", "http", "system"])
text = st.sampled_from(["", "x", "$(A)", "$(POD_NAME)-$(B)", "8000", "$$(A)"])
env_name = st.sampled_from(["A", "B", "C", "POD_NAME", "DYN_HTTP_PORT", "DYN_DRAIN_SECONDS"])
variable = st.one_of(
    st.fixed_dictionaries({"name": env_name, "value": text}),
    st.fixed_dictionaries(
        {
            "name": env_name,
            "valueFrom": st.just({"secretKeyRef": {"name": "s", "key": "k"}}),
        }
    ),
)
env = st.lists(variable, max_size=4, unique_by=lambda entry: entry["name"])
ports = st.lists(
    st.fixed_dictionaries(
        {"containerPort": st.sampled_from([8000, 9090, 5557, 7000]), "name": word}
    ),
    max_size=3,
    unique_by=(lambda port: port["containerPort"], lambda port: port["name"]),
)
mounts = st.lists(
    st.fixed_dictionaries(
        {
            "name": word | st.just("shared-memory"),
            "mountPath": st.sampled_from(["/dev/shm", "/models", "/root/.cache/vllm", "/x"]),
        }
    ),
    max_size=3,
    unique_by=lambda mount: mount["mountPath"],
)
strings = st.dictionaries(
    st.sampled_from(["app", "nvidia.com/dynamo-component", "nvidia.com/metrics-enabled", "z"]),
    st.sampled_from(["a", "b"]),
    max_size=3,
)
image = st.sampled_from(
    [
        "dynamo-platform/vllm:1",
        "dynamo-platform/frontend:1",
        f"{NVIDIA}/vllm-runtime:1",
        f"{NVIDIA}/sglang-runtime:1",
        "vllm/vllm-openai:v1",
        "x/y:1",
    ]
)
command = st.sampled_from(
    [
        [],
        ["python3", "-m", "dynamo.vllm"],
        ["python3", "-m", "dynamo.frontend"],
        ["python3", "-m", "dynamo.trtllm"],
        ["sh", "-c", "python3 -m dynamo.vllm --model $A"],
        ["sh", "-c", "python3 -m dynamo.vllm | tee x"],
        ["dynamo", "worker", "sim"],
        ["dynamo", "worker", "vllm"],
        ["vllm", "serve", "m"],
        ["bash", "-c", "set -e; exec python3 -m dynamo.sglang --tp 8"],
        ["run"],
    ]
)
args = st.lists(
    st.sampled_from(
        [
            "--model",
            "m",
            "--disaggregation-mode",
            "prefill",
            "--namespace=x",
            "",
            "-m",
            "dynamo.x",
            "-tp",
            "4",
            "--data-parallel-size=2",
        ]
    ),
    max_size=4,
)
probe = st.sampled_from([{"tcpSocket": {"port": 1}}, {"exec": {"command": ["true"]}}])
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["", "t"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(word, inner, max_size=2),
    max_leaves=5,
)
container = st.fixed_dictionaries(
    {"image": image},
    optional={
        "command": command,
        "args": args,
        "env": env,
        "ports": ports,
        "volumeMounts": mounts,
        "livenessProbe": probe,
        "readinessProbe": probe,
        "startupProbe": probe,
        "resources": st.just({"limits": {"nvidia.com/gpu": "2"}}),
        "workingDir": st.just("/w"),
        "terminationMessagePolicy": st.just("File"),
        "lifecycle": anything,
        "securityContext": anything,
    },
)


@st.composite
def pod_templates(draw: st.DrawFn) -> dict[str, Any]:
    containers = [{"name": "main", **draw(container)}] if draw(st.booleans()) else []
    containers += [{"name": name, **draw(container)} for name in draw(st.sets(word, max_size=2))
                   if name != "main"]  # fmt: skip
    draw(st.randoms()).shuffle(containers)
    spec: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "terminationGracePeriodSeconds": st.integers(0, 1000),
                "serviceAccountName": st.just("mine"),
                "automountServiceAccountToken": st.booleans(),
                "securityContext": st.just({"runAsUser": 1}),
                "nodeSelector": strings,
                "tolerations": st.just([{"key": "k"}, {"key": "l"}]),
                "affinity": anything,
                "volumes": st.lists(
                    st.fixed_dictionaries({"name": word | st.just("shared-memory")}),
                    max_size=3,
                    unique_by=lambda volume: volume["name"],
                ),
            },
        )
    )
    if containers:
        spec["containers"] = containers
    metadata = draw(st.fixed_dictionaries({}, optional={"labels": strings, "annotations": strings}))
    return {"metadata": metadata, "spec": spec}


def with_a_sidecar_that_exists(component: dict[str, Any]) -> dict[str, Any]:
    containers = component.get("podTemplate", {}).get("spec", {}).get("containers", [])
    if component.get("frontendSidecar") not in [c["name"] for c in containers]:
        component.pop("frontendSidecar", None)
    return component


component = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["frontend", "worker", "prefill", "decode", "planner"]),
        "replicas": st.integers(0, 3),
        "podTemplate": pod_templates(),
        "scalingAdapter": st.just({}),
        "sharedMemorySize": st.sampled_from(["0", 0, "1Gi", "0.0"]),
        "compilationCache": st.sampled_from(
            [{"pvcName": "p"}, {"pvcName": "p", "mountPath": "/x"}]
        ),
        "modelRef": st.just({"name": "m"}),
        "globalDynamoNamespace": st.booleans(),
        "frontendSidecar": word,
        "multinode": st.just({"nodeCount": 2}),
    },
).map(with_a_sidecar_that_exists)
wishes = st.fixed_dictionaries(
    {},
    optional={
        "nvidia.com/gateway": st.sampled_from(["g", "n/g", "/g", "n/", "a/b/c"]),
        "nvidia.com/network-policy": st.sampled_from(["false", "true"]),
        "nvidia.com/vllm-distributed-executor-backend": st.sampled_from(["mp", "ray", "x"]),
        "nvidia.com/dynamo-platform-v1alpha1": st.sampled_from(
            ["", "{", "[]", "{}", '{"spec": {"object": {"pvcs": [{"name": 1}]}}}']
        ),
    },
)
graphs = st.builds(
    lambda components, spec, names, wishes: {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "g", "annotations": wishes},
        "spec": {
            **spec,
            "components": [
                {"name": name, **fields} for name, fields in zip(names, components, strict=False)
            ],
        },
    },
    st.lists(component, max_size=3),
    st.fixed_dictionaries({}, optional={"env": env, "labels": strings, "annotations": strings}),
    st.permutations(["Frontend", "Worker", "x-1"]),
    wishes,
)


def shuffled(value: Any, random: Any) -> Any:
    """The same data with the keys of every map in another order."""
    if isinstance(value, dict):
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key], random) for key in keys}
    if isinstance(value, list):
        return [shuffled(item, random) for item in value]
    return value


@settings(max_examples=80, deadline=None)
@given(graphs, st.randoms())
def test_equal_graphs_give_the_same_bytes(graph: dict[str, Any], random: Any) -> None:
    model = DynamoGraphDeployment.model_validate(graph)
    before = model.model_copy(deep=True)
    first = render_with_notes(model, PLATFORM)
    assert model == before, "rendering changed the graph"
    again = render_with_notes(
        DynamoGraphDeployment.model_validate(shuffled(graph, random)), PLATFORM
    )
    assert to_json(first.manifests) == to_json(again.manifests)
    assert first.notes == again.notes


def lost(user: Any, rendered: Any, path: str) -> Iterator[str]:
    """Paths of what the author wrote and `rendered` does not hold. Lists of named things are
    compared by name; everything else must be there as it was."""
    if user in ([], {}):
        return
    if isinstance(user, dict) and isinstance(rendered, dict):
        for key, value in user.items():
            if value is None:
                continue
            if key not in rendered:
                yield f"{path}.{key}"
            else:
                yield from lost(value, rendered[key], f"{path}.{key}")
    elif isinstance(user, list) and isinstance(rendered, list) and _key(user):
        key = _key(user)
        there = {item[key]: item for item in rendered}
        for item in user:
            if item[key] not in there:
                yield f"{path}[{item[key]}]"
            else:
                yield from lost(item, there[item[key]], f"{path}[{item[key]}]")
    elif user != rendered:
        yield path


def _key(items: list[Any]) -> str:
    for key in ("mountPath", "containerPort", "name"):
        if items and all(isinstance(item, dict) and key in item for item in items):
            return key
    return ""


@settings(max_examples=150, deadline=None)
@given(graphs)
def test_nothing_the_author_wrote_is_lost(graph: dict[str, Any]) -> None:
    model = DynamoGraphDeployment.model_validate(graph)
    rendered = render_with_notes(model, PLATFORM)
    templates = {
        component.name: component.templates.get("pod") or component.templates["leader"]
        for component in rendered.components
    }
    said = {(note.component, note.reason) for note in rendered.notes}
    for described in model.spec.components:
        name = described.name
        template = copy.deepcopy(described.pod_template or {})
        for label in RESERVED & template.get("metadata", {}).get("labels", {}).keys():
            if template["metadata"]["labels"].pop(label) != name:
                assert (name, "LabelReserved") in said
        spec = template.get("spec", {})
        if (name, "FrontendSidecarReplaced") in said:
            spec["containers"] = [
                c for c in spec["containers"] if c["name"] != described.frontend_sidecar
            ]
        for main in spec.get("containers", []):
            if main["name"] == "main" and (
                described.multinode is not None
                or said & {(name, "RuntimeMapped"), (name, "FlagsTranslated")}
            ):
                for key in REPLACED:
                    main.pop(key, None)
            if main["name"] == "main":
                for key in ("command", "args"):
                    if not main.get(key):
                        main.pop(key, None)
        found = templates[name]
        assert list(lost(template, found, "podTemplate")) == []
        main = next(c for c in found["spec"]["containers"] if c["name"] == "main")
        variables = {entry["name"] for entry in main["env"]}
        assert {entry.name for entry in model.spec.env} <= variables
