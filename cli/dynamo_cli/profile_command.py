"""`dynamo profile`: how long a live engine takes, as a file for planner and simulated engine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dynamo_planner.profiling import Plan


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or found[0] < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers above 0; write 128,512,2048")
    return found


def profile(
    url: Annotated[str, typer.Option(help="The engine, such as http://10.0.0.7:8000.")],
    out: Annotated[Path, typer.Option(help="File to write, JSON.")] = Path("timing-profile.json"),
    model: Annotated[str, typer.Option(help="Model name; by default the engine's first.")] = "",
    prompts: Annotated[
        str, typer.Option(help="Lengths of prompts, tokens.", metavar="NUMBERS")
    ] = "128,512,1024,2048,4096",
    batches: Annotated[
        str, typer.Option(help="Answers at once.", metavar="NUMBERS")
    ] = "1,2,4,8,16,32,64,128",
    context: Annotated[
        int, typer.Option(min=1, help="Length of prompts in a batch, tokens.")
    ] = 256,
    answer: Annotated[int, typer.Option(min=16, help="Length of answers in a batch, tokens.")] = 96,
) -> None:
    """Measure an engine that has nothing else to do, and write its timing profile.

    The planner reckons with it (key profile_results_dir), and the simulated engine takes as long as
    it says (--timing-profile).

    Examples:

      dynamo profile --url http://127.0.0.1:8000

      dynamo profile --url http://127.0.0.1:8000 --prompts 256,1024 --batches 1,8,32 --out a.json
    """
    from dynamo_planner.profiling import Plan, ProfilingFailed

    plan = Plan(_numbers(prompts), _numbers(batches), context=context, answer=answer)
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out.parent} is no folder", param_hint="--out")
    try:
        asyncio.run(_profile(url, model, plan, out))
    except ProfilingFailed as error:
        sys.stderr.write(f"dynamo profile: {error}\n")
        raise typer.Exit(1) from None


async def _profile(url: str, model: str, plan: Plan, out: Path) -> None:
    from dataclasses import replace

    import aiohttp
    import msgspec
    from dynamo_planner.profiling import HttpEngine, ProfilingFailed, measure, profile_of
    from dynamo_planner.profiling.engine import TIMEOUT_S

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    prefills: list[tuple[float, float]] = []
    steps: list[tuple[int, float]] = []
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        engine = await HttpEngine.at(session, url, model)
        if engine.longest is not None:
            fitting = tuple(n for n in plan.prompts if n < engine.longest)
            if not fitting or plan.context + plan.answer > engine.longest:
                raise ProfilingFailed(f"{engine.model} takes {engine.longest} tokens at most")
            if left := set(plan.prompts) - set(fitting):
                typer.echo(f"left out: prompts of {sorted(left)} tokens, longer than the engine's")
            plan = replace(plan, prompts=fitting)
        typer.echo(f"measuring {engine.model} at {url}")
        async for point in measure(engine, plan):
            what = "tokens of prompt" if point.kind == "prefill" else "answers at once"
            if point.seconds is None:
                typer.echo(f"  {point.size:>6} {what}: {point.note}")
                continue
            typer.echo(f"  {point.size:>6} {what}: {1000 * point.seconds:.2f} ms")
            (prefills if point.kind == "prefill" else steps).append((point.size, point.seconds))
    if not steps:
        raise ProfilingFailed("no batch could be measured; longer answers may help (--answer)")
    found = profile_of(prefills, steps)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    typer.echo(
        f"{out}: {found.prefill_tokens_per_s:.0f} prompt tokens/s after "
        f"{1000 * found.prefill_overhead_s:.1f} ms, {len(found.decode)} batches"
    )
