"""What the caller decides: templates used again, replicas, restarts; and what counts as a change
of the author's."""

import copy
from typing import Any

import pytest
from dynamo_operator.render import (
    Kept,
    Platform,
    Rendered,
    RenderedComponent,
    Scale,
    render_with_notes,
    template_inputs,
)

HASH = "nvidia.com/dynamo-worker-hash"
RESTART = "nvidia.com/restartAt"


def worker(name: str, type: str = "worker", **fields: Any) -> dict[str, Any]:
    template = {"spec": {"containers": [{"name": "main", "image": "dynamo-platform/vllm:1"}]}}
    return {"name": name, "type": type, "podTemplate": template, **fields}


PD = (worker("P", "prefill"), worker("D", "decode"), {"name": "F", "type": "frontend"})


def deployments(rendered: Rendered) -> dict[str, dict[str, Any]]:
    return {
        m["metadata"]["labels"]["nvidia.com/dynamo-component"]: m
        for m in rendered.manifests
        if m["kind"] == "Deployment"
    }


def by_name(rendered: Rendered) -> dict[str, RenderedComponent]:
    return {component.name: component for component in rendered.components}


def kept(rendered: Rendered) -> Kept:
    return Kept(rendered.worker_hash, {c.name: c.templates for c in rendered.components})


def test_a_component_says_what_runs_it(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph(*PD), platform)
    assert rendered.generation == rendered.worker_hash
    for name, deployment in deployments(rendered).items():
        component = by_name(rendered)[name]
        assert component.workload_kind == "Deployment"
        assert component.workload == deployment["metadata"]["name"]
        assert component.selector == deployment["spec"]["selector"]["matchLabels"]
        labels = component.templates["pod"]["metadata"]["labels"]
        assert HASH not in labels
    aggregated = render_with_notes(graph(worker("W")), platform)
    assert (aggregated.generation, len(aggregated.worker_hash)) == ("", 8)


def test_kept_templates_bring_back_what_ran(graph: Any, platform: Platform) -> None:
    before = render_with_notes(graph(*PD), platform)
    newer = Platform(image_tag="test", drain_seconds=7, shared_memory_size="1Gi")
    changed = render_with_notes(graph(*PD), newer)
    assert changed.worker_hash != before.worker_hash
    again = render_with_notes(graph(*PD), newer, kept=kept(before))
    assert again == before


def test_a_component_that_was_not_there_is_rendered_afresh(graph: Any, platform: Platform) -> None:
    before = render_with_notes(graph(worker("A")), platform)
    both = graph(worker("A"), {"name": "F", "type": "frontend"})
    rendered = render_with_notes(both, Platform(image_tag="new"), kept=kept(before))
    found = deployments(rendered)
    assert found["A"]["spec"]["template"] == deployments(before)["A"]["spec"]["template"]
    assert found["F"]["spec"]["template"]["spec"]["containers"][0]["image"].endswith(":new")


def test_replicas_are_the_callers(graph: Any, platform: Platform) -> None:
    described = graph(worker("A", replicas=2, scalingAdapter={}), worker("B", replicas=3))
    scale = {"A": Scale(5, marker="2"), "B": Scale(None)}
    rendered = render_with_notes(described, platform, scale=scale)
    found = deployments(rendered)
    assert found["A"]["spec"]["replicas"] == 5
    assert found["A"]["metadata"]["annotations"] == {"nvidia.com/dynamo-kept-replicas": "2"}
    assert "replicas" not in found["B"]["spec"]
    assert "annotations" not in found["B"]["metadata"]
    assert [c.replicas for c in rendered.components] == [2, 3]
    [adapter] = [m for m in rendered.manifests if m["kind"].endswith("ScalingAdapter")]
    assert adapter["spec"]["replicas"] == 5


def test_a_restart_stamps_pods_and_changes_no_generation(graph: Any, platform: Platform) -> None:
    plain = render_with_notes(graph(*PD), platform)
    rendered = render_with_notes(graph(*PD), platform, restarts={"P": "now"})
    stamps = {
        name: d["spec"]["template"]["metadata"].get("annotations", {}).get(RESTART)
        for name, d in deployments(rendered).items()
    }
    assert stamps == {"P": "now", "D": None, "F": None}
    assert rendered.components == plain.components
    assert rendered.worker_hash == plain.worker_hash


ROLES = {"W": "worker", "F": "frontend", "P": "planner"}


def inputs(graph: Any, **roles: str) -> dict[str, str]:
    return template_inputs(graph.spec, graph.metadata.annotations, {**ROLES, **roles})


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda g: g["spec"]["components"][0].update(replicas=4), ""),
        (lambda g: g["spec"]["components"][0].update(minAvailable=1), ""),
        (lambda g: g["spec"]["components"][0].update(scalingAdapter={}), "P"),
        (lambda g: g["spec"]["components"][1].update(scalingAdapter={}), ""),
        (lambda g: g["spec"].update(restart={"id": "1"}), ""),
        (lambda g: g["metadata"].update(annotations={"x": "y"}), ""),
        (lambda g: g["spec"]["components"].append({"name": "G"}), "G"),
        (lambda g: g["spec"]["components"].reverse(), ""),
        (lambda g: g["spec"]["components"][0]["podTemplate"].update(metadata={}), "W"),
        (lambda g: g["spec"]["components"][1].update(sharedMemorySize="1Gi"), "F"),
        (lambda g: g["spec"].update(labels={"x": "y"}), "FPW"),
        (lambda g: g["spec"].update(env=[{"name": "x", "value": "y"}]), "FPW"),
        (lambda g: g["spec"].update(backendFramework="sglang"), "FPW"),
        (lambda g: g["metadata"].update(annotations={"nvidia.com/adopt-rendering": "1"}), "FPW"),
        (lambda g: g["metadata"].update(annotations={"nvidia.com/enable-metrics": "no"}), "FPW"),
    ],
)
def test_what_an_author_changes_about_pods(graph: Any, change: Any, changed: str) -> None:
    planner = {"name": "P", "type": "planner"}
    before = graph(worker("W"), {"name": "F", "type": "frontend"}, planner)
    manifest = copy.deepcopy(before.manifest())
    change(manifest)
    after = type(before).model_validate(manifest)
    old, new = inputs(before), inputs(after)
    assert "".join(sorted(name for name in new if new[name] != old.get(name))) == changed


def test_pickers_depend_on_whether_they_pair(graph: Any) -> None:
    described = graph(*PD)
    aggregated = inputs(described, P="worker", D="worker")
    split = inputs(described, P="prefill", D="decode")
    assert [name for name in split if split[name] != aggregated[name]] == ["F"]
