"""`dynamo up`: a graph on this machine, its pods as processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def up(
    file: Annotated[
        Path,
        typer.Argument(help="Manifest with a DynamoGraphDeployment.", show_default=False),
    ],
    exec_: Annotated[
        str | None,
        typer.Option(
            "--exec",
            metavar="CMD",
            help="Run this shell command when all is ready, then end with its status. It finds the "
            "frontend in DYNAMO_URL and the logs in DYNAMO_STATE_DIR.",
            show_default=False,
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for logs and the endpoints file; kept. Without it a temporary folder is "
            "used, and kept only if something failed.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Give up if not everything is ready after this time. Default: 600 with --exec, "
            "else wait for ever.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a graph on this machine: every pod as processes on its own loopback address.

    The same file that `kubectl apply` takes. Ctrl-C ends it and leaves nothing behind.

    Examples:

      dynamo up examples/quickstart.yaml

      dynamo up examples/quickstart.yaml --exec 'dynamo chat "hello"'

      dynamo up graph.yaml --state-dir ./run --timeout 120
    """
    # Imported here: `dynamo --help` needs none of it.
    from dynamo_cli.local.up import Options, run_up

    raise typer.Exit(run_up(Options(file, exec_, state_dir, timeout)))
