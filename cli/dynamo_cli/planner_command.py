"""`dynamo planner replay`: a recorded run, decided anew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def replay(
    file: Annotated[Path, typer.Argument(help="What `dynamo planner run --record` wrote.")],
    every: Annotated[
        bool, typer.Option("--every", help="Show every look, not only those that moved something.")
    ] = False,
) -> None:
    """Decide a recorded run anew, and show what was decided and why.

    The exit status is 0 if every decision is the same to the last bit, 1 if one is not, 2 for a
    file that is no recording.

    Examples:

      dynamo planner replay planner.jsonl

      dynamo planner replay --every planner.jsonl
    """
    from dynamo_planner import record

    looks = different = 0
    try:
        with file.open("rb") as lines:
            for each in record.replay(lines, str(file)):
                looks += 1
                changed = "" if each.same else "  (recorded otherwise)"
                for role in each.decision.roles:
                    if every or role.replicas != role.desired or changed:
                        moved = f"{role.desired} → {role.replicas}"
                        typer.echo(
                            f"{each.look.wall or f'{each.decision.at:.0f} s'}  {role.role}  "
                            f"{moved}  {role.reason}{changed}"
                        )
                if changed:
                    different += 1
                    if different == 1:
                        typer.echo(f"recorded: {each.look.decision}\nnow:      {each.decision}")
    except OSError as error:
        sys.stderr.write(f"dynamo planner replay: {file}: {error.strerror}\n")
        raise typer.Exit(2) from error
    except ValueError as error:
        sys.stderr.write(f"dynamo planner replay: {error}\n")
        raise typer.Exit(2) from error
    same = "all as recorded" if not different else f"{different} not as recorded"
    typer.echo(f"{looks} looks, {same}")
    raise typer.Exit(1 if different else 0)
