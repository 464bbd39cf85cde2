"""`dynamo operator run`: the process that turns graphs into objects and keeps them so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def run(
    watch_namespace: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DYN_WATCH_NAMESPACES",
            help="Take care of this namespace only; repeatable. It is marked with the Lease "
            "dynamo-operator-namespace-scope, so that a cluster-wide operator leaves it alone. "
            "Default: all namespaces that are not marked.",
        ),
    ] = None,
    namespace: Annotated[
        str,
        typer.Option(
            envvar="POD_NAMESPACE", help="Where the leader lease is; the pod's by default."
        ),
    ] = "",
    image_prefix: Annotated[
        str,
        typer.Option(
            envvar="DYN_IMAGE_PREFIX",
            help="Prefix of this platform's images, registry included, ending with a slash.",
        ),
    ] = "dynamo-platform/",
    image_tag: Annotated[
        str,
        typer.Option(
            envvar="DYN_IMAGE_TAG", help="Tag of this platform's images; its version by default."
        ),
    ] = "",
    map_image: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DYN_MAP_IMAGES",
            help="PREFIX=OURS: images of graphs that begin with PREFIX are replaced by ours; "
            "repeatable, beside NVIDIA's registry.",
        ),
    ] = None,
    pull_secret: Annotated[
        list[str] | None,
        typer.Option(
            "--image-pull-secret",
            envvar="DYN_IMAGE_PULL_SECRETS",
            help="Secret to put on pods whose author gave none; repeatable.",
        ),
    ] = None,
    pull_secrets: Annotated[
        list[str] | None,
        typer.Option(
            "--pull-secrets",
            envvar="DYN_PULL_SECRET_NAMESPACES",
            help="Namespace in which docker Secrets may be read, to find those of an image's "
            "registry; repeatable. Needs the right to read Secrets there.",
        ),
    ] = None,
    drain_seconds: Annotated[
        int,
        typer.Option(
            envvar="DYN_DEFAULT_DRAIN_SECONDS",
            min=5,
            help="Running requests of a pod that ends get this long, unless the graph says.",
        ),
    ] = 900,
    leader_elect: Annotated[
        bool,
        typer.Option(
            envvar="DYN_LEADER_ELECT",
            help="Wait for the lease, so that of several replicas one works and the others stand "
            "by with warm caches.",
        ),
    ] = True,
    lease_seconds: Annotated[
        int,
        typer.Option(
            envvar="DYN_LEASE_SECONDS",
            min=3,
            help="A leader that is silent for so long is followed by another; one that can't renew "
            "its lease for two thirds of it writes nothing.",
        ),
    ] = 15,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Graphs that are reconciled at the same time.")
    ] = 8,
    discovery_seconds: Annotated[
        float,
        typer.Option(
            envvar="DYN_DISCOVERY_SECONDS",
            min=0.1,
            help="How often the API server is asked which optional kinds it serves: "
            "LeaderWorkerSets, InferencePools, HTTPRoutes, PodMonitors.",
        ),
    ] = 60.0,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(
            envvar="KUBECONFIG", help="Instead of the pod's service account.", dir_okay=False
        ),
    ] = None,
    system_host: Annotated[
        str, typer.Option(envvar="DYN_SYSTEM_HOST", help="Bind address of the status server.")
    ] = "0.0.0.0",
    system_port: Annotated[
        int,
        typer.Option(
            envvar="DYN_SYSTEM_PORT", min=1, max=65535, help="Port of /live, /ready, /metrics."
        ),
    ] = 9090,
    log_level: Annotated[
        str, typer.Option(envvar="DYN_LOG_LEVEL", help="DEBUG, INFO, WARNING or ERROR.")
    ] = "INFO",
) -> None:
    """Reconcile DynamoGraphDeployments, until told to stop.

    It is ready when its caches are filled. When another has taken its lease, it ends with status 1,
    so that its Deployment starts it anew as a standby.

    Examples:

      dynamo operator run --image-prefix registry.example/dynamo-platform/

      dynamo operator run --watch-namespace team-a --kubeconfig ~/.kube/config
    """
    from dataclasses import replace

    from dynamo_operator.controller import OperatorSettings, run_operator
    from dynamo_operator.render import Platform
    from dynamo_operator.render.platform import image_map
    from dynamo_runtime import lifecycle as process
    from dynamo_runtime import logs

    def split(values: list[str] | None) -> tuple[str, ...]:
        """Repeated, or as one variable with commas."""
        parts = (part.strip() for value in values or () for part in value.split(","))
        return tuple(part for part in parts if part)

    try:
        logs.configure("operator", log_level)
        platform = Platform(
            images=image_map(split(map_image), image_prefix),
            own_prefix=image_prefix,
            image_pull_secrets=split(pull_secret),
            drain_seconds=drain_seconds,
        )
        if image_tag:
            platform = replace(platform, image_tag=image_tag)
    except ValueError as problem:
        sys.stderr.write(f"dynamo operator run: {problem}\n")
        raise typer.Exit(2) from problem
    settings = OperatorSettings(
        namespaces=split(watch_namespace),
        namespace=namespace,
        kubeconfig=kubeconfig,
        leader_elect=leader_elect,
        lease_seconds=lease_seconds,
        workers=workers,
        pull_secret_namespaces=split(pull_secrets),
        discovery_seconds=discovery_seconds,
        platform=platform,
        status_host=system_host,
        status_port=system_port,
    )

    async def main(lifecycle: process.Lifecycle) -> int:
        return await run_operator(settings, lifecycle)

    raise typer.Exit(process.run(main))
