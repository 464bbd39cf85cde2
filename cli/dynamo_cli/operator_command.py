"""`dynamo operator webhook|crds|manifests`: what is installed beside the operator, and how.

The code behind a command is imported when it is used, as everywhere in the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

Kubeconfig = Annotated[
    Path | None,
    typer.Option(envvar="KUBECONFIG", help="Instead of the pod's service account.", dir_okay=False),
]
ImagePrefix = Annotated[
    str,
    typer.Option(
        envvar="DYN_IMAGE_PREFIX",
        help="Prefix of this platform's images, registry included, ending with a slash.",
    ),
]
ImageTag = Annotated[
    str,
    typer.Option(
        envvar="DYN_IMAGE_TAG", help="Tag of this platform's images; its version by default."
    ),
]
MapImage = Annotated[
    list[str] | None,
    typer.Option(
        envvar="DYN_MAP_IMAGES",
        help="PREFIX=OURS: images of graphs that begin with PREFIX are replaced by ours; "
        "repeatable, beside NVIDIA's registry.",
    ),
]
LogLevel = Annotated[
    str, typer.Option(envvar="DYN_LOG_LEVEL", help="DEBUG, INFO, WARNING or ERROR.")
]


def webhook(
    namespace: Annotated[
        str,
        typer.Option(
            envvar="POD_NAMESPACE",
            help="Namespace of its Secret and Service; the pod's by default.",
        ),
    ] = "",
    service: Annotated[
        str, typer.Option(help="Service by which the API server calls it.")
    ] = "dynamo-operator-webhook",
    configuration: Annotated[
        str, typer.Option(help="ValidatingWebhookConfiguration that names it.")
    ] = "dynamo-operator",
    name: Annotated[
        list[str] | None,
        typer.Option(help="Further name or address by which it is called; repeatable."),
    ] = None,
    cert_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="DYN_WEBHOOK_CERT_DIR",
            help="Folder with tls.crt, tls.key and maybe ca.crt that somebody else keeps "
            "(cert-manager); read again when they change. Default: certificates of its own, in a "
            "Secret.",
            file_okay=False,
        ),
    ] = None,
    install_crds: Annotated[
        bool,
        typer.Option(help="Install and update the CRDs at start; ends if they are Dynamo's."),
    ] = False,
    watch_namespace: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DYN_WATCH_NAMESPACES",
            help="It belongs to an operator restricted to this namespace; repeatable. Conversion "
            "is then the cluster-wide operator's.",
        ),
    ] = None,
    dry_run_seconds: Annotated[
        float,
        typer.Option(
            envvar="DYN_WEBHOOK_DRY_RUN_SECONDS",
            min=0,
            max=9,
            help="Longest time for trying a graph's objects at the API server; 0 tries none.",
        ),
    ] = 3.0,
    image_prefix: ImagePrefix = "dynamo-platform/",
    image_tag: ImageTag = "",
    map_image: MapImage = None,
    kubeconfig: Kubeconfig = None,
    host: Annotated[
        str, typer.Option(envvar="DYN_WEBHOOK_HOST", help="Bind address of the webhook.")
    ] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(envvar="DYN_WEBHOOK_PORT", min=0, max=65535, help="Port of the webhook.")
    ] = 9443,
    system_host: Annotated[
        str, typer.Option(envvar="DYN_SYSTEM_HOST", help="Bind address of the status server.")
    ] = "0.0.0.0",
    system_port: Annotated[
        int,
        typer.Option(
            envvar="DYN_SYSTEM_PORT", min=0, max=65535, help="Port of /live, /ready, /metrics."
        ),
    ] = 9090,
    log_level: LogLevel = "INFO",
) -> None:
    """Answer the API server's questions: may this graph be stored, how does it look in v1alpha1?

    It is ready when it serves a valid certificate and the API server has been told whom to trust.
    Status 1: the CRDs belong to an installed Dynamo, or a port is taken.

    Examples:

      dynamo operator webhook --install-crds

      dynamo operator webhook --cert-dir /certificates

      dynamo operator webhook --kubeconfig ~/.kube/config --namespace dynamo-system --name 10.0.0.1
    """
    from dynamo_operator.admission.server import Rules
    from dynamo_operator.admission.webhook import WebhookSettings, run_webhook
    from dynamo_operator.render import Platform
    from dynamo_runtime import __version__
    from dynamo_runtime import lifecycle as process
    from dynamo_runtime.kubernetes.access import NoCluster
    from dynamo_runtime.kubernetes.client import KubernetesClient

    _configure_logs("webhook", log_level)
    platform = Platform(
        own_prefix=image_prefix,
        images=_image_map("webhook", map_image, image_prefix),
        image_tag=image_tag or __version__,
    )
    restricted = bool(watch_namespace)

    async def main(lifecycle: process.Lifecycle) -> int:
        try:
            client = await KubernetesClient.from_environment(
                kubeconfig=kubeconfig, user_agent="dynamo-operator-webhook"
            )
        except NoCluster as error:
            sys.stderr.write(f"dynamo operator webhook: {error}\n")
            return 1
        async with client:
            settings = WebhookSettings(
                rules=Rules(platform, dry_run_seconds, respects_scope=not restricted),
                namespace=namespace or client.namespace,
                service=service,
                configuration=configuration,
                names=tuple(name or ()),
                certificates=cert_dir,
                conversion=not restricted,
                installs_crds=install_crds,
                host=host,
                port=port,
                status_host=system_host,
                status_port=system_port,
            )
            return await run_webhook(settings, client, lifecycle)

    raise typer.Exit(process.run(main))


def crds(
    apply: Annotated[
        bool, typer.Option("--apply", help="Install or update them instead of printing.")
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="With --apply: also replace CRDs that are not ours. For when the operator they "
            "belong to has been uninstalled.",
        ),
    ] = False,
    webhook: Annotated[
        bool,
        typer.Option(
            help="Whether a webhook converts between versions; without one, only v1beta1 is served."
        ),
    ] = True,
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", help="Namespace of the webhook's Service.")
    ] = "dynamo-system",
    service: Annotated[
        str, typer.Option(help="The webhook's Service.")
    ] = "dynamo-operator-webhook",
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the CustomResourceDefinitions, or install them with --apply.

    CRDs of these names that belong to an installed Dynamo are left alone: status 1. So are those of
    a newer release of this operator, which its graphs may need.

    Examples:

      dynamo operator crds | kubectl diff -f -

      dynamo operator crds --apply
    """
    import asyncio

    from dynamo_crds.generate import KINDS, WebhookService
    from dynamo_operator.install.crds import ForeignCrds, apply_crds, released
    from dynamo_operator.render.text import to_yaml
    from dynamo_runtime.kubernetes.access import NoCluster
    from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient

    answering = WebhookService(namespace, service) if webhook else None
    if not apply:
        typer.echo(to_yaml([released(kind, answering) for kind in KINDS]), nl=False)
        return

    async def install() -> None:
        async with await KubernetesClient.from_environment(
            kubeconfig=kubeconfig, user_agent="dynamo-operator-crds"
        ) as client:
            for applied in await apply_crds(client, answering, take_over=take_over):
                typer.echo(f"{applied.name}: {applied.result}")

    try:
        asyncio.run(install())
    except (ForeignCrds, ApiError, NoCluster) as error:
        typer.echo(f"dynamo operator crds: {error}", err=True)
        raise typer.Exit(1) from error


def manifests(
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", help="Namespace of operator and webhook.")
    ] = "dynamo-system",
    image_prefix: ImagePrefix = "dynamo-platform/",
    image_tag: ImageTag = "",
    map_image: MapImage = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Of the operator: one leads, the others stand by.")
    ] = 2,
    watch_namespace: Annotated[
        list[str] | None,
        typer.Option(
            help="Restrict it to this namespace, with rights in no other; repeatable. The CRDs are "
            "then not its business: a cluster-wide one installs them, or `dynamo operator crds`."
        ),
    ] = None,
    webhook: Annotated[
        bool, typer.Option(help="Whether a webhook admits graphs and serves v1alpha1.")
    ] = True,
    cert_manager: Annotated[
        bool,
        typer.Option("--cert-manager", help="Let cert-manager make the webhook's certificate."),
    ] = False,
    pull_secrets: Annotated[
        list[str] | None,
        typer.Option(
            help="Namespace in which the operator may read Secrets, to find the pull secrets of "
            "images by their registry; repeatable."
        ),
    ] = None,
) -> None:
    """Print the manifests that install operator and webhook.

    The webhook installs the CRDs when it starts. With --no-webhook or --watch-namespace, and where
    no cluster-wide operator has installed them, apply them first: `dynamo operator crds --apply
    --no-webhook`.

    Examples:

      dynamo operator manifests --image-prefix reg.example/dynamo-platform/ | kubectl apply -f -

      dynamo operator manifests --namespace team-a --watch-namespace team-a --no-webhook
    """
    from dynamo_operator.install.manifests import manifests as installed
    from dynamo_operator.install.settings import Installation
    from dynamo_operator.render.text import to_yaml
    from dynamo_runtime import __version__

    _image_map("manifests", map_image, image_prefix)
    installation = Installation(
        namespace=namespace,
        map_images=tuple(map_image or ()),
        image_prefix=image_prefix,
        replicas=replicas,
        watch_namespaces=tuple(watch_namespace or ()),
        webhook=webhook,
        cert_manager=cert_manager,
        pull_secrets=tuple(pull_secrets or ()),
        image_tag=image_tag or __version__,
    )
    typer.echo(to_yaml(installed(installation)), nl=False)


def _image_map(command: str, mappings: list[str] | None, prefix: str) -> dict[str, str]:
    from dynamo_operator.render.platform import image_map

    try:
        return image_map(mappings or (), prefix)
    except ValueError as problem:
        sys.stderr.write(f"dynamo operator {command}: {problem}\n")
        raise typer.Exit(2) from problem


def _configure_logs(component: str, level: str) -> None:
    from dynamo_runtime import logs

    try:
        logs.configure(component, level)
    except ValueError as problem:
        sys.stderr.write(f"dynamo operator {component}: {problem}\n")
        raise typer.Exit(2) from problem
