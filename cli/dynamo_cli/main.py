"""The `dynamo` command: one entry to everything a person or a container starts.

A command's module is imported when the command is used, so that a worker's container needs nothing
of what the frontend needs; a missing extra is named instead of shown as a traceback.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from dynamo_runtime import __version__
from typer.core import TyperGroup

# Top-level module of a third-party package -> the extra that brings it.
EXTRAS = {
    "cryptography": "epp",
    "envoy": "epp",
    "grpc": "epp",
    "jinja2": "epp",
    "kubernetes_asyncio": "operator",
    "numpy": "router",
    "opentelemetry": "otel",
    "pydantic": "crds",
    "starlette": "worker",
    "statsmodels": "planner",
    "tokenizers": "epp",
    "uvicorn": "worker",
    "zmq": "router",
}

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

# Path of a command -> (module, function, click's context settings), in the order of `--help`.
COMMANDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "up": ("up_command", "up", {}),
    "chat": ("chat_command", "chat", {}),
    "explain": ("explain_command", "explain", {}),
    "validate": ("validate_command", "validate", {}),
    "render": ("render_command", "render", {}),
    "frontend": ("frontend_command", "frontend", PASS_THROUGH),
    "epp": ("epp_command", "epp", PASS_THROUGH | {"help_option_names": ["--help"]}),
    "worker sim": ("worker_command", "sim", PASS_THROUGH),
    "worker vllm": ("worker_command", "vllm", PASS_THROUGH),
    "profile": ("profile_command", "profile", {}),
    "planner run": ("planner_command", "run", {}),
    "planner explain": ("planner_command", "explain", {}),
    "planner replay": ("planner_command", "replay", {}),
    "model tiny": ("model_command", "tiny", {}),
    "operator run": ("operator_run_command", "run", {}),
    "operator webhook": ("operator_command", "webhook", {}),
    "operator crds": ("operator_command", "crds", {}),
    "operator manifests": ("operator_command", "manifests", {}),
}


class LazyGroup(TyperGroup):
    """A group whose commands are those of ``COMMANDS`` below ``path``; imports them on use."""

    path = ""

    def list_commands(self, ctx: Any) -> list[str]:
        mine = [name.removeprefix(self.path) for name in COMMANDS if name.startswith(self.path)]
        return list(dict.fromkeys(name.partition(" ")[0] for name in mine))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        full = self.path + cmd_name
        if full in GROUPS:
            return typer.main.get_command(GROUPS[full])
        if full not in COMMANDS:
            return None
        name, function, settings = COMMANDS[full]
        module = importlib.import_module(f"dynamo_cli.{name}")
        app = typer.Typer(
            add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
        )
        cls = getattr(module, "COMMAND_CLASS", None)  # of its own, to read arguments its own way
        app.command(cmd_name, cls=cls, context_settings=dict(settings))(getattr(module, function))
        return typer.main.get_command(app)


class WorkerGroup(LazyGroup):
    path = "worker "


class ModelGroup(LazyGroup):
    path = "model "


class PlannerGroup(LazyGroup):
    path = "planner "


class OperatorGroup(LazyGroup):
    path = "operator "


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynamo {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="dynamo",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def dynamo(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Serve large language models from a DynamoGraphDeployment.

    Try `dynamo up examples/quickstart.yaml`, then `dynamo chat` in another terminal.
    """


def _group(cls: type[LazyGroup], text: str) -> typer.Typer:
    group = typer.Typer(
        name=cls.path.strip(),
        cls=cls,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help=text,
    )
    group.callback()(lambda: None)
    return group


GROUPS = {
    "worker": _group(WorkerGroup, "Run a worker: an engine and our launcher beside it."),
    "model": _group(ModelGroup, "Make models to try things with."),
    "planner": _group(PlannerGroup, "Scale a graph's workers, and see why."),
    "operator": _group(OperatorGroup, "Run the operator on Kubernetes, and install it."),
}


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
