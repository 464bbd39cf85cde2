"""The `dynamo` command: one entry to everything a person or a container starts.

Command modules import only typer at their top, so that `dynamo validate` needs none of what
`dynamo frontend` needs; a missing extra is named instead of shown as a traceback.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from dynamo_runtime import __version__

from dynamo_cli import (
    chat_command,
    explain_command,
    frontend_command,
    model_command,
    render_command,
    up_command,
    validate_command,
    worker_command,
)

# Top-level module of a third-party package -> the extra that brings it.
EXTRAS = {
    "envoy": "epp",
    "grpc": "epp",
    "jinja2": "epp",
    "numpy": "router",
    "pydantic": "crds",
    "starlette": "worker",
    "tokenizers": "epp",
    "uvicorn": "worker",
    "zmq": "router",
}

app = typer.Typer(
    name="dynamo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "Serve large language models from a DynamoGraphDeployment.\n\n"
        "Try `dynamo up examples/quickstart.yaml`, then `dynamo chat` in another terminal."
    ),
)
worker = typer.Typer(no_args_is_help=True, help="Run a worker: an engine and our launcher.")
model = typer.Typer(no_args_is_help=True, help="Make models to try things with.")


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"dynamo {__version__}")
        raise typer.Exit


app.command("up")(up_command.up)
app.command("chat")(chat_command.chat)
app.command("explain")(explain_command.explain)
app.command("validate")(validate_command.validate)
app.command("render")(render_command.render)
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("frontend", context_settings=PASS_THROUGH)(frontend_command.frontend)
app.add_typer(worker, name="worker")
app.add_typer(model, name="model")
worker.command("sim", context_settings=PASS_THROUGH)(worker_command.sim)
worker.command("vllm", context_settings=PASS_THROUGH)(worker_command.vllm)
model.command("tiny")(model_command.tiny)


@model.callback()
def _model() -> None:
    """Keeps `tiny` a subcommand: typer would take a lone command for the group itself."""


def main() -> None:
    """Entry point of the `dynamo` script."""
    try:
        app()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        sys.stderr.write(
            f"dynamo: this command needs the package {error.name!r}: "
            f"install it with `pip install 'dynamo-platform[{extra}]'`\n"
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
