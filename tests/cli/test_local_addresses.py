"""Addresses that never collide, also not between processes."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from dynamo_cli.local.addresses import Addresses, PortTaken, check_ports, claim_block

HOLD = """
import sys
from dynamo_cli.local.addresses import Addresses
addresses = Addresses()
print(addresses.take(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def addresses() -> Iterator[Addresses]:
    made = Addresses()
    yield made
    made.release()


def test_two_processes_get_different_addresses_and_a_dead_ones_are_free_again(
    addresses: Addresses,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = other.stdout.readline().strip()
        assert theirs.startswith("127.")
        assert theirs != addresses.take()
        prefix = theirs.rpartition(".")[0]
        other.kill()
        other.wait()
    deadline = time.monotonic() + 20
    while prefix not in claim_three():  # another run on this machine may hold it for a while
        assert time.monotonic() < deadline


def claim_three() -> list[str]:
    """The prefixes of the three first blocks that are free."""
    blocks = [claim_block() for _ in range(3)]
    for block in blocks:
        block.release()
    return [block.prefix for block in blocks]


def test_more_pods_than_a_block_has_addresses(addresses: Addresses) -> None:
    taken = [addresses.take() for _ in range(300)]
    assert len(set(taken)) == 300
    assert len(addresses.blocks) == 2


def test_an_address_is_not_reused_while_others_are_fresh(addresses: Addresses) -> None:
    first = addresses.take()
    addresses.give_back(first)
    assert addresses.take() != first
    rest = [addresses.take() for _ in range(253)]
    assert first in rest


def test_a_port_that_somebody_holds_on_all_addresses_is_named_with_its_holder(
    addresses: Addresses,
) -> None:
    address = addresses.take()
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} is in use .*\(pid \d+\).*{address}"):
            check_ports(address, {"http": port})
    check_ports(address, {"http": port})
