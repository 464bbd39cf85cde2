"""Writes docs/metrics.md: every metric of every process, read from the registries themselves.

`--check` writes nothing and fails if the file is out of date.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from dynamo_epp.gateway.process import stream_gauge
from dynamo_epp.serving import PickerSettings, ServingKvPicker
from dynamo_operator.admission.metrics import WebhookMetrics
from dynamo_operator.controller.metrics import OperatorMetrics
from dynamo_planner.metrics import PlannerMetrics
from dynamo_runtime.lifecycle import Lifecycle
from dynamo_workers.metrics import WorkerMetrics
from prometheus_client import CollectorRegistry

TARGET = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

HEAD = """\
# Metrics

Every process serves them at `/metrics` of its status server (port 9090 as a rule). Where Dynamo,
llm-d or controller-runtime measure the same thing, the name is theirs. A histogram `x` has the
series `x_bucket`, `x_sum` and `x_count`. Labels are bounded: models are those that workers serve,
at most 1,000 (then `other`), never what a client wrote.

This page is generated: `make generate`.
"""


def picker(registry: CollectorRegistry) -> None:
    async def make() -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = PickerSettings(endpoints_file=Path(folder) / "endpoints.json")
            await ServingKvPicker(settings, Lifecycle(), registry).stop()

    asyncio.run(make())


PROCESSES: dict[str, Callable[[CollectorRegistry], object]] = {
    "The picker: `dynamo frontend` and `dynamo epp`": picker,
    "Only `dynamo epp`": stream_gauge,
    "Workers: `dynamo worker`": WorkerMetrics,
    "`dynamo planner run`": PlannerMetrics,
    "`dynamo operator run`": OperatorMetrics,
    "`dynamo operator webhook`": WebhookMetrics,
}


def table(registry: CollectorRegistry) -> str:
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    # The public interface tells no labels of a metric that nothing has counted yet.
    for collector in sorted(registry._collector_to_names, key=lambda each: each._name):
        name = f"{collector._name}_total" if collector._type == "counter" else collector._name
        labels = ", ".join(f"`{label}`" for label in collector._labelnames)
        text = " ".join(collector._documentation.split()).rstrip(".").replace("|", "\\|")
        lines.append(f"| `{name}` | {collector._type} | {labels} | {text} |")
    return "\n".join(lines)


def page() -> str:
    parts = [HEAD]
    for title, register in PROCESSES.items():
        registry = CollectorRegistry()
        register(registry)
        parts.append(f"## {title}\n\n{table(registry)}\n")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    wanted = page()
    if not parser.parse_args().check:
        TARGET.write_text(wanted, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != wanted:
        print(f"{TARGET.name} is out of date; run `make generate`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
