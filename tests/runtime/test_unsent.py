"""What lies in the kernel's buffers for readers that are slow."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from dynamo_runtime.unsent import unsent, unsent_in, until_sent

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F40 00000000:0000 0A 00000005:00000000 00:00000000 00000000     0        0 1
   1: 0100007F:1F40 0100007F:D2F0 01 000003E8:00000000 01:00000015 00000000     0        0 2
   2: 0200007F:1F40 0100007F:D2F2 04 00000010:00000000 01:00000015 00000000     0        0 3
   3: 0100007F:2382 0100007F:D2F4 01 00000777:00000000 01:00000015 00000000     0        0 4
"""
MAPPED = """\
  sl  local_address rem_address   st tx_queue rx_queue
   0: 0000000000000000FFFF00000100007F:1F40 0000000000000000FFFF00000100007F:D2F0 01 00000003:0
"""


class Connection:
    """A server's end of a connection on loopback, and the reader's."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port: int = server.getsockname()[1]
            self.reader = socket.create_connection(("127.0.0.1", self.port))
            self.server, _ = server.accept()
        self.reader.setblocking(False)
        self.server.setblocking(False)

    def fill(self) -> int:
        """Send until nothing more fits into the buffers; how much that was."""
        sent = 0
        try:
            while True:
                sent += self.server.send(b"x" * 65536)
        except BlockingIOError:
            return sent

    async def take(self, size: int) -> None:
        """Read so much."""
        loop = asyncio.get_running_loop()
        while size:
            size -= len(await loop.sock_recv(self.reader, min(size, 65536)))

    def close(self) -> None:
        self.server.close()
        self.reader.close()


@pytest.fixture
def connection() -> Iterator[Connection]:
    made = Connection()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("host", "bytes"),
    [("0.0.0.0", 1016), ("localhost", 1016), ("::", 1016), ("127.0.0.1", 1000), ("127.0.0.2", 16)],
)
def test_a_servers_own_connections_count(host: str, bytes: int) -> None:
    assert unsent_in(TABLE, host, 8000) == bytes


def test_ipv4_readers_of_an_ipv6_server_count() -> None:
    assert unsent_in(MAPPED, "127.0.0.1", 8000) == unsent_in(MAPPED, "::", 8000) == 3
    assert unsent_in(MAPPED, "127.0.0.2", 8000) == 0


async def test_a_slow_reader_is_waited_for(connection: Connection) -> None:
    size = connection.fill()
    assert unsent("127.0.0.1", connection.port) > 0
    waiting = asyncio.create_task(until_sent("127.0.0.1", connection.port, 30.0))
    await connection.take(size // 2)
    assert not waiting.done()
    await connection.take(size - size // 2)
    assert await waiting == 0


async def test_what_a_server_has_closed_counts(connection: Connection) -> None:
    size = connection.fill()
    connection.server.close()
    assert unsent("127.0.0.1", connection.port) > 0
    waiting = asyncio.create_task(until_sent("127.0.0.1", connection.port, 30.0))
    await connection.take(size)
    assert await waiting == 0


async def test_a_reader_that_has_gone_is_not_waited_for(connection: Connection) -> None:
    connection.fill()
    assert await until_sent("127.0.0.1", connection.port, 30.0, stall_s=0.2) > 0
    assert await until_sent("127.0.0.1", connection.port, 0.0) > 0


async def test_nobody_reads() -> None:
    assert await until_sent("127.0.0.1", 1, 30.0) == 0
