"""`dynamo explain`: why requests went where they went."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dynamo_cli.explain.pickers import Picker


def explain(
    request_id: Annotated[
        str | None, typer.Argument(help="x-request-id of one request; all of the last without it.")
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="Status server of a picker, such as http://10.0.0.7:9090; once for each replica. "
            "Found by itself for graphs that `dynamo up` runs."
        ),
    ] = None,
    graph: Annotated[str, typer.Option(help="In a cluster: the graph whose pickers to ask.")] = "",
    pool: Annotated[
        str, typer.Option(help="In a cluster: the InferencePool whose picker to ask.")
    ] = "",
    namespace: Annotated[
        str,
        typer.Option("--namespace", "-n", help="Of the graph or pool; by default the context's."),
    ] = "",
    context: Annotated[str | None, typer.Option(help="Of the kubeconfig.")] = None,
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Instead of $KUBECONFIG or ~/.kube/config.")
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the last decisions.")] = 20,
    worker: Annotated[
        str, typer.Option(help="Only decisions for this worker (the name of its pod).")
    ] = "",
    model: Annotated[str, typer.Option(help="Only requests for this model.")] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="table or json.")] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on with each new decision, until Ctrl-C.")
    ] = False,
) -> None:
    """Show the last routing decisions, or one in full with every candidate.

    The answer to each request carries its x-request-id. In a cluster all replicas of the picker
    are asked through the API server, which needs the rights to list pods and to get pods/proxy in
    the namespace (with --pool also to get inferencepools and services).

    Examples:

      dynamo explain

      dynamo explain 0b6f9a5e-4c4f-9f5e-8a0d-3f2f3f0e3c55

      dynamo explain --graph my-graph -n team-a --worker my-graph-decode-0

      dynamo explain --url http://127.0.0.1:9090 --watch --json
    """
    from dynamo_cli.explain.pickers import InCluster, NoAnswer, at_urls, in_cluster, local_urls

    if output not in ("table", "json"):
        raise typer.BadParameter(f"{output!r} is neither table nor json", param_hint="--output")
    if sum(map(bool, (url, graph, pool))) > 1:
        raise typer.BadParameter("--url, --graph and --pool are three ways to say whom to ask")
    if (namespace or context or kubeconfig) and not (graph or pool):
        raise typer.BadParameter("name the --graph or the --pool in that cluster")
    if watch and request_id is not None:
        raise typer.BadParameter("one request is not watched: leave out --watch, or the id")
    where: AbstractAsyncContextManager[list[Picker]]
    try:
        if graph or pool:
            where = in_cluster(InCluster(graph, pool, namespace, context, kubeconfig))
        else:
            where = at_urls(url or local_urls())
        filters = {"worker": worker, "model": model}
        filters = {name: value for name, value in filters.items() if value}
        json = as_json or output == "json"
        with contextlib.suppress(KeyboardInterrupt):
            if watch:
                asyncio.run(_watch(where, last, json, filters))
            elif request_id is not None:
                asyncio.run(_one(where, request_id, json))
            else:
                asyncio.run(_newest(where, last, json, filters))
    except NoAnswer as error:
        _warn(str(error))
        raise typer.Exit(1) from None


def _warn(message: str) -> None:
    sys.stderr.write(f"dynamo explain: {message}\n")


def _tell_silent(silent: dict[str, str]) -> None:
    for name, why in silent.items():
        _warn(f"{name}: {why}")


def _print_json(data: Any, *, indent: int) -> None:
    import msgspec

    encoded = msgspec.json.encode(data)
    typer.echo((msgspec.json.format(encoded, indent=indent) if indent else encoded).decode())


async def _ask(
    where: AbstractAsyncContextManager[list[Picker]], **params: str
) -> tuple[list[Picker], list[dict[str, Any]]]:
    """Raises ``NoAnswer`` if no replica answers; those that don't beside others are warned of."""
    from dynamo_cli.explain.pickers import NoAnswer, decisions

    async with where as pickers:
        answers = await decisions(pickers, **params)
    if len(answers.silent) == len(pickers):
        raise NoAnswer("; ".join(f"{name}: {why}" for name, why in answers.silent.items()))
    _tell_silent(answers.silent)
    return pickers, answers.decisions


async def _newest(
    where: AbstractAsyncContextManager[list[Picker]], last: int, json: bool, filters: dict[str, str]
) -> None:
    from dynamo_cli.explain import show

    brief = {} if json else {"brief": "1"}
    _, found = await _ask(where, limit=str(last), **brief, **filters)
    if json:
        _print_json(found[:last], indent=2)
    else:
        show.table(found[:last])


async def _one(
    where: AbstractAsyncContextManager[list[Picker]], request_id: str, json: bool
) -> None:
    from dynamo_cli.explain import show
    from dynamo_cli.explain.pickers import NoAnswer

    pickers, found = await _ask(where, request_id=request_id)
    if not found:
        names = ", ".join(picker.name for picker in pickers)
        raise NoAnswer(
            f"nothing about request {request_id!r} is kept at {names}: only the last decisions and "
            "refusals are, and nothing of requests that the proxy answered by itself"
        )
    if json:
        _print_json(found, indent=2)
    else:
        for decision in found:
            show.one(decision)


async def _watch(
    where: AbstractAsyncContextManager[list[Picker]], last: int, json: bool, filters: dict[str, str]
) -> None:
    from dynamo_cli.explain import show
    from dynamo_cli.explain.watching import watch

    async with where as pickers:
        async for decision in watch(pickers, last, filters, _tell_silent):
            if json:
                _print_json(decision, indent=0)
            else:
                typer.echo(show.line(decision))
