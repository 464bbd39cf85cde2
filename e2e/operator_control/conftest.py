"""A control plane for the quick cases of this folder; an operator for each file that wants one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from dynamo_operator.install.crds import apply_crds

from e2e.cluster.fixtures import skip_where_nothing_is_started
from e2e.operator_control.plane import Plane
from e2e.operator_control.process import START_S, Operator
from e2e.operator_control.world import World, until

FAKE_NODES = 4

StartOperator = Callable[..., Operator]

_numbers = itertools.count(1)


def prepared(folder: Path, nodes: int) -> Plane:
    """A plane that runs, with our CRDs, the operators' accounts and so many fake nodes."""
    skip_where_nothing_is_started()
    plane = Plane(folder)
    plane.up()

    async def prepare() -> None:
        async with await plane.client() as api:
            await apply_crds(api, None)
            await plane.make_accounts(api)

    try:
        asyncio.run(prepare())
        plane.cluster.add_kwok_nodes(nodes)
    except BaseException:
        plane.down()
        raise
    return plane


@pytest.fixture(scope="package")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """The control plane of the quick cases."""
    made = prepared(tmp_path_factory.mktemp("plane"), FAKE_NODES)
    yield made
    made.down()


@pytest.fixture
def own_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Plane]]:
    """`own_plane(nodes) -> Plane`: one for this test alone, to be treated badly."""
    made: list[Plane] = []

    def make(nodes: int) -> Plane:
        made.append(prepared(tmp_path_factory.mktemp("plane"), nodes))
        return made[-1]

    yield make
    for each in made:
        each.down()


@pytest_asyncio.fixture
async def world(plane: Plane) -> AsyncIterator[World]:
    """The objects of the quick cases' plane."""
    async with await plane.client() as api:
        yield World(plane, api)


@pytest_asyncio.fixture
async def namespace(world: World) -> AsyncIterator[str]:
    """A namespace of this test alone."""
    async with world.namespace(f"ctl-{next(_numbers)}") as name:
        yield name


@pytest.fixture
def start_operator(plane: Plane) -> Iterator[StartOperator]:
    """`start_operator(account, …) -> Operator`, as `Operator` takes it; all end with the test."""
    yield from _operators(plane)


@pytest.fixture(scope="module")
def operator(plane: Plane) -> Iterator[Operator]:
    """A cluster-wide operator for the tests of one file, as the account `alpha`."""
    for start in _operators(plane):
        made = start("alpha")
        asyncio.run(until("operator leads", made.leads, START_S))
        yield made


def _operators(plane: Plane) -> Iterator[StartOperator]:
    made: list[Operator] = []

    def start(account: str, **options: object) -> Operator:
        made.append(Operator(plane, account, **options))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for each in made:
        each.close()
        # Shown only if the test failed.
        print(f"--- operator {each.account}", each.output, sep="\n")
