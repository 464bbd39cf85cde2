"""Two webhooks whose certificates somebody else keeps, in folders that change at different times.

As Secrets do that cert-manager renews and kubelets mount: a minute or more apart.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dynamo_operator.admission.bundle import publish
from dynamo_operator.admission.certificates import (
    MOST_OTHERS,
    Material,
    SystemRandomness,
    joined,
    renewed,
    to_files,
)
from dynamo_operator.admission.webhook import Webhook
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from dynamo_runtime.lifecycle import Lifecycle
from prometheus_client import CollectorRegistry

from tests.operator.test_admission_certificates import BEGIN, NAMES, trusts
from tests.operator.test_admission_server import SETTINGS, bundles, install
from tests.runtime.kube_api import KubeApi, serving

LOOK = timedelta(seconds=60)
DAY = timedelta(days=1)


def issued(now: datetime) -> Material:
    """A certificate of an authority that nobody has heard of: cert-manager's `selfSigned`, say."""
    return renewed(None, NAMES, now, SystemRandomness())


class World:
    """The cluster's bundles, its two webhooks and their folders."""

    def __init__(self, api: KubeApi, client: KubernetesClient, folder: Path) -> None:
        self.api = api
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.folders = [folder / "a", folder / "b"]
        self.webhooks: list[Webhook] = []
        for each in self.folders:
            each.mkdir()
            settings = replace(SETTINGS, certificates=each)
            parts = Lifecycle(), CollectorRegistry()
            self.webhooks.append(Webhook(settings, client, *parts, lambda: self.now))

    def mount(self, replica: int, material: Material) -> None:
        for name, content in to_files(material).items():
            (self.folders[replica] / name).write_bytes(content)

    async def shown(self, replica: int) -> bytes:
        """The certificate that this webhook's callers get, PEM."""
        blind = ssl.create_default_context()
        blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
        port = self.webhooks[replica].server.port
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=blind)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        await writer.wait_closed()
        return ssl.DER_cert_to_PEM_cert(der).encode()

    async def look(self, replica: int) -> None:
        """One webhook looks; then API servers, also those that have not heard of what it changed,
        trust what both show."""
        before = bundles(self.api)
        assert await self.webhooks[replica].step()
        for certificate in [await self.shown(each) for each in (0, 1)]:
            for bundle in before | bundles(self.api):
                assert trusts(bundle, certificate, self.now)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with (
        serving() as api,
        KubernetesClient(Access(api.url), user_agent="test") as client,
    ):
        install(api)
        world = World(api, client, tmp_path)
        first = issued(world.now)
        for replica, webhook in enumerate(world.webhooks):
            world.mount(replica, first)
            assert await webhook.step()
        yield world
        for webhook in world.webhooks:
            await webhook.server.stop()


async def test_what_a_replica_shows_is_trusted_at_every_moment(world: World) -> None:
    """Certificates of ever new authorities, mounted and looked at in any order."""
    rng = random.Random(1)
    for _ in range(4):
        world.now += timedelta(days=60)
        new = issued(world.now)
        mounts = {replica: rng.randrange(4) for replica in (0, 1)}
        for look in range(6):
            for replica in rng.sample((0, 1), 2):
                if mounts[replica] == look:
                    world.mount(replica, new)
                world.now += LOOK / 2
                await world.look(replica)
        for replica in (0, 1):
            assert await world.shown(replica) == new.serving.certificate


async def test_once_all_agree_nothing_is_written(world: World) -> None:
    new = issued(world.now)
    for replica in (0, 1, 0, 1):
        world.mount(replica, new)
        await world.look(replica)
    before = world.api.version
    for replica in (0, 1, 0, 1):
        await world.look(replica)
    assert world.api.version == before


async def test_two_that_add_at_once_both_stand_in_it(world: World) -> None:
    """Each patch is held against what it was made from."""
    wanted = [issued(world.now).bundle for _ in range(2)]
    client = world.webhooks[0]._client
    await asyncio.gather(
        *(publish(client, each, "dynamo-operator", world.now, conversion=True) for each in wanted)
    )
    for bundle in bundles(world.api):
        assert all(each in bundle for each in wanted)


def test_the_expired_are_dropped_and_of_the_others_the_oldest() -> None:
    made = [issued(BEGIN + number * DAY).bundle for number in range(MOST_OTHERS + 2)]
    *others, ours = made
    bundle = ours
    for each in others:
        bundle = joined(each, bundle, BEGIN)
    assert joined(ours, bundle, BEGIN) == b"".join(made[1:])
    assert joined(ours, bundle + b"-----BEGIN CERTIFICATE-----\n?\n", BEGIN) == b"".join(made[1:])
    later = BEGIN + timedelta(days=3 * 365 + 5)
    assert joined(ours, bundle, later) == b"".join(made[6:])
    with pytest.raises(ValueError, match="PEM"):
        joined(b"?", bundle, BEGIN)
