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
        typer.Argument(
            help="Manifest with one or more DynamoGraphDeployments; - for standard input.",
            metavar="FILE",
        ),
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
    from dynamo_crds.load import parse_graph, read_documents
    from dynamo_crds.problem import InvalidManifest
    from dynamo_operator.render import Manifest, Platform, render_with_notes
    from dynamo_operator.render.text import to_json, to_yaml

    from dynamo_cli.validate_command import EXIT_MISTAKES, EXIT_UNREADABLE, Unreadable, read

    try:
        text, name = read(file)
    except Unreadable as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_UNREADABLE) from error
    documents, problems = read_documents(text, name)
    graphs = [document for document in documents if document.is_graph]
    platform = Platform(namespace=namespace)
    manifests: list[Manifest] = []
    for document in graphs:
        try:
            graph = parse_graph(document)
        except InvalidManifest as error:
            problems += error.problems
            continue
        rendered = render_with_notes(graph, platform)
        manifests += rendered.manifests
        for note in rendered.notes:
            typer.echo(f"{graph.metadata.name}: {note}", err=True)
    for problem in problems:
        typer.echo(str(problem), err=True)
    if not graphs and not problems:
        typer.echo(f"{name}: no DynamoGraphDeployment in it", err=True)
    if problems or not graphs:
        raise typer.Exit(EXIT_MISTAKES)
    typer.echo(to_yaml(manifests) if output is Output.YAML else to_json(manifests), nl=False)
