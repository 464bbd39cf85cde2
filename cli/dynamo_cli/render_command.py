"""`dynamo render`: what a graph becomes in Kubernetes, as text; nothing is applied."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Output(enum.StrEnum):
    """Form of the manifests."""

    YAML = "yaml"
    JSON = "json"


def render(
    file: Annotated[
        Path,
        typer.Argument(help="Manifest with one or more DynamoGraphDeployments.", metavar="FILE"),
    ],
    output: Annotated[
        Output, typer.Option("--output", "-o", help="YAML documents, or one JSON List.")
    ] = Output.YAML,
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", help="Namespace of graphs that name none.")
    ] = "default",
) -> None:
    """Print the manifests of every graph in a file, and on stderr what there is to say of them.

    A field that is not rendered, or an image that is replaced, gives a note.

    Examples:

      dynamo render graph.yaml | kubectl diff -f -

      dynamo render graph.yaml -o json | jq '.items[].metadata.name'
    """
    # Imported here: pydantic belongs to the extra `crds`, and other commands do without it.
    from dynamo_crds.load import load_documents, parse_graph
    from dynamo_crds.problem import InvalidManifest
    from dynamo_operator.render import Manifest, Platform, render_with_notes
    from dynamo_operator.render.text import to_json, to_yaml

    platform = Platform(namespace=namespace)
    manifests: list[Manifest] = []
    problems: list[str] = []
    graphs = 0
    try:
        documents = load_documents(file)
    except InvalidManifest as error:
        documents = []
        problems += map(str, error.problems)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        typer.echo(f"{file}: {reason}", err=True)
        raise typer.Exit(1) from error
    for document in documents:
        if not document.is_graph:
            continue
        graphs += 1
        try:
            graph = parse_graph(document)
        except InvalidManifest as error:
            problems += map(str, error.problems)
            continue
        rendered = render_with_notes(graph, platform)
        manifests += rendered.manifests
        for note in rendered.notes:
            typer.echo(f"{graph.metadata.name}: {note}", err=True)
    if not graphs and not problems:
        problems.append(f"{file}: no DynamoGraphDeployment in it")
    if problems:
        for problem in problems:
            typer.echo(problem, err=True)
        raise typer.Exit(1)
    typer.echo(to_yaml(manifests) if output is Output.YAML else to_json(manifests), nl=False)
