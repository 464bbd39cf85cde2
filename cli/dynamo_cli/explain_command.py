"""`dynamo explain`: why requests went where they went."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Annotated, Any

import typer


def explain(
    request_id: Annotated[
        str | None, typer.Argument(help="x-request-id of one request; all of the last without it.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Status server of the picker, such as http://10.0.0.7:9090. "
            "Found by itself for graphs that `dynamo up` runs."
        ),
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the last decisions.")] = 20,
    output: Annotated[str, typer.Option("--output", "-o", help="table or json.")] = "table",
) -> None:
    """Show the last routing decisions, or one in full with every candidate.

    The answer to each request carries its x-request-id.

    Examples:

      dynamo explain

      dynamo explain 0b6f9a5e-4c4f-9f5e-8a0d-3f2f3f0e3c55

      dynamo explain --url http://127.0.0.1:9090 -o json
    """
    if output not in ("table", "json"):
        raise typer.BadParameter(f"{output!r} is neither table nor json", param_hint="--output")
    if url is None:
        url = _status_url()
    decisions = asyncio.run(_fetch(url, request_id, last))
    if request_id is not None and not decisions:
        _fail(
            f"no decision about request {request_id!r} is kept at {url}: only the last ones are, "
            "and none for requests that were refused as malformed or for an unknown model"
        )
    if output == "json":
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(decisions), indent=2).decode())
    elif request_id is not None:
        _print_one(decisions[0])
    else:
        _print_table(decisions)


def _fail(message: str) -> None:
    sys.stderr.write(f"dynamo explain: {message}\n")
    raise typer.Exit(1)


def _status_url() -> str:
    from dynamo_cli.local.record import running_ups

    url = os.environ.get("DYNAMO_URL")
    ups = [up for up in running_ups() if url is None or up.url == url]
    frontends = [pod for up in ups for pod in up.pods if pod.role == "frontend"]
    urls = [f"http://{pod.address}:{pod.status_port or 9090}" for pod in frontends]
    if len(urls) != 1:
        runs = ", ".join(f"{p.name} ({url})" for p, url in zip(frontends, urls, strict=True))
        found = f"running: {runs}" if urls else "no frontend of a running `dynamo up` was found"
        _fail(f"{found}; name the picker's status server with --url http://HOST:9090")
    return urls[0]


async def _fetch(url: str, request_id: str | None, last: int) -> list[dict[str, Any]]:
    import aiohttp

    params = {"limit": str(last)} if request_id is None else {"request_id": request_id}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
            session.get(url.rstrip("/") + "/debug/decisions", params=params) as answer,
        ):
            if answer.status != 200:
                _fail(f"{url} answered {answer.status}; is it a picker's status server?")
            decisions: list[dict[str, Any]] = (await answer.json())["decisions"]
            return decisions
    except (aiohttp.ClientError, TimeoutError) as error:
        _fail(f"{url} can't be reached: {error or type(error).__name__}")
        raise  # not reached: _fail exits


def _outcome(decision: dict[str, Any]) -> str:
    outcome = decision["outcome"]
    status = outcome.get("status")
    if status is None:
        return "running"
    # A stream that broke off began with 200.
    return f"{status} {flags}" if (flags := outcome.get("flags")) else str(status)


def _worker(decision: dict[str, Any], ranked: list[dict[str, Any]]) -> str:
    """The pick, and who answered if that was another."""
    if not ranked:
        return "(none)"
    name = str(ranked[0]["name"])
    served_by = decision["outcome"].get("served_by")
    return f"{name} → {served_by}" if served_by else name


def _console() -> Any:
    """Wide where nobody's terminal limits it, so that pipes and logs get whole columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 240, highlight=False)


def _print_table(decisions: list[dict[str, Any]]) -> None:
    from rich.table import Table

    console = _console()
    if not decisions:
        console.print("No decisions yet.")
        return
    table = Table(box=None, header_style="bold")
    for name in ("time", "request", "model", "how", "overlap", "tokens", "worker", "status"):
        table.add_column(name, no_wrap=name != "worker")
    for decision in decisions:
        ranked = [c for c in decision["candidates"] if not c["dropped"]]
        overlap = f"{ranked[0]['overlap_blocks']}/{decision['blocks']}" if ranked else "-"
        tokens = decision["prompt_tokens"]
        table.add_row(
            time.strftime("%H:%M:%S", time.localtime(decision["time"])),
            decision["request_id"],
            decision["model"],
            decision["how"],
            overlap,
            str(tokens) if tokens >= 0 else "-",
            _worker(decision, ranked),
            _outcome(decision),
        )
    console.print(table)


def _print_one(decision: dict[str, Any]) -> None:
    from rich.table import Table

    console = _console()
    console.print(f"request  {decision['request_id']}  {decision['path']}  {decision['model']}")
    why = f" ({decision['reason']})" if decision["reason"] else ""
    console.print(f"decision {decision['how']}{why}, mode {decision['mode']}")
    tokens = decision["prompt_tokens"]
    if tokens >= 0:
        console.print(
            f"prompt   {tokens} tokens = {decision['blocks']} blocks of {decision['block_size']}"
        )
    stages = ", ".join(f"{name} {ms:.2f} ms" for name, ms in decision["stages_ms"].items())
    console.print(f"took     {stages}")
    outcome = ", ".join(f"{name} {value}" for name, value in decision["outcome"].items())
    console.print(f"outcome  {outcome or 'not known yet'}")
    table = Table(box=None, header_style="bold")
    for name in ("", "worker", "endpoint", "overlap", "cost", "terms", "requests", "why not"):
        table.add_column(name)
    for rank, candidate in enumerate(decision["candidates"]):
        terms = " + ".join(f"{name} {value:g}" for name, value in candidate["terms"].items())
        cost = candidate["cost"]
        why_not = candidate["dropped"] or ("" if rank == 0 else "ranked lower")
        table.add_row(
            "→" if rank == 0 and not candidate["dropped"] else "",
            candidate["name"],
            candidate["endpoint"],
            str(candidate["overlap_blocks"]),
            "-" if cost is None else f"{cost:g}",
            terms,
            f"{candidate['active_requests']:g}",
            why_not,
        )
    console.print(table)
