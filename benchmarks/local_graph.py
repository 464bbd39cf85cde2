"""A graph of simulated workers, run by `dynamo up` under a load that tells what it saw."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]


def component(name: str, kind: str, args: list[str], replicas: int) -> Json:
    """A component of a type whose image has the same name."""
    main = {"name": "main", "image": f"dynamo-platform/{kind}", "args": args}
    return {
        "name": name,
        "type": kind,
        "replicas": replicas,
        "podTemplate": {"spec": {"containers": [main]}},
    }


def graph(name: str, *components: Json) -> Json:
    return {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": name},
        "spec": {"components": list(components)},
    }


def measure(
    manifest: Json, load: Path, what: str, folder: Path, options: Sequence[str] = ()
) -> Json:
    """Run the graph with the script `load` against it: what that prints after `RESULT `.

    Ends the program with everything that was printed if that is not one line, or the run fails;
    `what` names the run. `options` are the script's, `folder` takes the manifest's file and logs.
    """
    file = folder / "graph.yaml"
    file.write_text(yaml.safe_dump(manifest))
    run = subprocess.run(
        [
            *(sys.executable, "-m", "dynamo_cli.main", "up", str(file)),
            *("--state-dir", str(folder / "state")),
            *("--exec", shlex.join([sys.executable, str(load), *options])),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    results = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode != 0 or len(results) != 1:
        sys.exit(f"{what} failed with status {run.returncode}:\n{run.stdout}")
    measured: Json = json.loads(results[0].removeprefix("RESULT "))
    return measured
