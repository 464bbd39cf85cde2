"""Rules for every test of the repository: in CI nothing is skipped in silence."""

import os
from collections.abc import Generator

import hypothesis
import pytest

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # `dynamo_cli.local.asking` says why

# How long an example takes is the machine's business, not a property of the code.
hypothesis.settings.register_profile(
    "default-without-deadline",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default-without-deadline")

# Reasons for which a test may be skipped in CI, by how the reason starts. All else must run there.
ALLOWED_SKIPS = (
    "CORPORA is not set",
    "CORPORA names no folder",
    "pods need a node, and a node needs root",
    "no Chromium is installed",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        allowed = reason.startswith(ALLOWED_SKIPS)
        if not allowed or (reason.startswith("CORPORA") and os.environ.get("CORPORA")):
            report.outcome = "failed"
            report.longrepr = f"skipped in CI, where it must run: {reason}"
    return report
