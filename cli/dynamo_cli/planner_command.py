"""`dynamo planner`: `run`, the process; `explain`, what it decided and why; `replay`, a recorded
run decided anew."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

log = logging.getLogger(__name__)


def run(
    config: Annotated[
        str,
        typer.Option(
            help="Dynamo's PlannerConfig: a JSON or YAML file, or the object itself.",
            metavar="FILE|OBJECT",
        ),
    ] = "",
    record: Annotated[
        Path | None,
        typer.Option(help="Write what is seen and decided to this file; `replay` reads it."),
    ] = None,
    log_level: Annotated[
        str, typer.Option(envvar="DYN_LOG_LEVEL", help="DEBUG, INFO, WARNING or ERROR.")
    ] = "INFO",
) -> None:
    """Scale the workers of a graph to what they need, and no further.

    Runs in the pod of a component of type planner; `dynamo up` runs it, too. Where it is the
    environment says, as the operator renders it: DYN_PLANNER_COMPONENTS, DYN_PARENT_DGD_K8S_NAME,
    DYN_PARENT_DGD_K8S_NAMESPACE, DYN_DISCOVERY_BACKEND, DYN_SYSTEM_HOST, DYN_SYSTEM_PORT (9090:
    /ready, /metrics, /planner, /planner/decisions), PLANNER_PROMETHEUS_PORT.

    Examples:

      dynamo planner run --config planner.yaml

      dynamo planner run --config '{"mode": "agg", "optimization_target": "latency"}'
    """
    from dynamo_planner.config import given_config
    from dynamo_planner.performance import load_profiles
    from dynamo_planner.predict import warmup
    from dynamo_planner.serving import run_planner
    from dynamo_planner.settings import Settings
    from dynamo_planner.state import State
    from dynamo_runtime import lifecycle, logs
    from dynamo_runtime.timing_profile import InvalidProfile

    try:
        logs.configure("planner", log_level)
        given = given_config(config, os.environ)
        chosen = given.config
        settings = Settings.from_env(os.environ, record)
        profiles = load_profiles(Path(chosen.profile_results_dir))
        state = State.begin(profiles)
        if trace := chosen.load_predictor_warmup_trace:
            with Path(trace).open() as lines:
                interval = chosen.throughput_adjustment_interval_seconds
                past = warmup(lines, interval, trace)
            state = State.begin(profiles, dict.fromkeys(chosen.roles, past))
    except (ValueError, InvalidProfile) as problem:
        sys.stderr.write(f"dynamo planner run: {problem}\n")
        raise typer.Exit(2) from problem
    except OSError as problem:
        name = problem.filename or chosen.load_predictor_warmup_trace
        sys.stderr.write(f"dynamo planner run: {name}: {problem.strerror}\n")
        raise typer.Exit(2) from problem
    if chosen.optimization_target == "sla":
        log.info("%s", profiles.note)
    raise typer.Exit(lifecycle.run(lambda life: run_planner(settings, given, state, life)))


def explain(
    url: Annotated[
        str,
        typer.Option(
            help="The planner's status server, such as http://10.0.0.7:9090. Found by itself for a "
            "graph that `dynamo up` runs."
        ),
    ] = "",
    graph: Annotated[str, typer.Option(help="In a cluster: the graph whose planner to ask.")] = "",
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", help="Of the graph; by default the context's.")
    ] = "",
    context: Annotated[str | None, typer.Option(help="Of the kubeconfig.")] = None,
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Instead of $KUBECONFIG or ~/.kube/config.")
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the last moves.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show what the planner sees, what it decided last and why, and its last moves.

    In a cluster it is asked through the API server, which needs the rights to list pods and to get
    pods/proxy in the namespace.

    Examples:

      dynamo planner explain

      dynamo planner explain --graph my-graph -n team-a
    """
    import asyncio

    import msgspec

    from dynamo_cli.explain.pickers import (
        PLANNER_ROLES,
        InCluster,
        NoAnswer,
        at_urls,
        in_cluster,
        local_urls,
    )
    from dynamo_cli.explain.planner import explained

    if url and graph:
        raise typer.BadParameter("--url and --graph are two ways to say whom to ask")
    if (namespace or context or kubeconfig) and not graph:
        raise typer.BadParameter("name the --graph in that cluster")

    async def ask() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        cluster = InCluster(graph, "", namespace, context, kubeconfig, PLANNER_ROLES)
        urls = [url] if url else [] if graph else local_urls(PLANNER_ROLES)
        async with in_cluster(cluster) if graph else at_urls(urls) as planners:
            return [
                (
                    planner.name,
                    await planner.get("/planner"),
                    await planner.get("/planner/decisions", moved="1"),
                )
                for planner in planners
            ]

    try:
        answers = asyncio.run(ask())
    except NoAnswer as error:
        sys.stderr.write(f"dynamo planner explain: {error}\n")
        raise typer.Exit(1) from None
    for name, now, moves in answers:
        if as_json:
            told = {"planner": name, **now, "moves": moves["decisions"][:last]}
            typer.echo(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
        else:
            typer.echo("\n".join(explained(name, now, moves["decisions"][:last])))


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
