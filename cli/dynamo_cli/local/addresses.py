"""A loopback address for each pod: 127.x.y.z, so that every pod has all ports to itself.

Two runs on one machine must never share an address, whoever started them. A run owns whole blocks
of 254 addresses; owning one is holding an abstract Unix socket named after it. The kernel keeps
such a name unique in exactly the scope in which loopback addresses are (the network namespace),
frees it when its last holder dies however it dies, and leaves no file behind.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

FIRST_BLOCK = (127, 77)  # 127.77.0.0/24 and on; 127.0.x.y is left to everybody else
BLOCKS = 178 * 256  # up to 127.254.255.0/24


class NoAddress(Exception):
    """Every block is taken; the message says so."""


class PortTaken(Exception):
    """A port that a pod needs has a listener; the message names it."""


class Block:
    """254 addresses that this process owns until ``release`` or its end."""

    def __init__(self, number: int, lock: socket.socket) -> None:
        high, low = divmod(number, 256)
        self.prefix = f"{FIRST_BLOCK[0]}.{FIRST_BLOCK[1] + high}.{low}"
        self.lock = lock

    def release(self) -> None:
        self.lock.close()


def claim_block() -> Block:
    """Own the first free block. Raises ``NoAddress``."""
    for number in range(BLOCKS):
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        block = Block(number, lock)
        try:
            lock.bind(f"\0dynamo-up/{block.prefix}")
            return block
        except OSError as error:
            lock.close()
            if error.errno != errno.EADDRINUSE:
                raise
    raise NoAddress("every block of loopback addresses (127.77.0.0 to 127.254.255.0) is in use")


class Addresses:
    """Hands out addresses of its blocks, each again only when the block has been gone through."""

    def __init__(self) -> None:
        self.blocks: list[Block] = [claim_block()]
        self._in_use: set[str] = set()
        self._cursor = self._walk(self.blocks[0])

    @staticmethod
    def _walk(block: Block) -> Iterator[str]:
        return (f"{block.prefix}.{host}" for host in range(1, 255))

    def take(self) -> str:
        while True:
            for address in self._cursor:
                if address not in self._in_use:
                    self._in_use.add(address)
                    return address
            if len(self._in_use) >= 254 * len(self.blocks):
                self.blocks.append(claim_block())
                self._cursor = self._walk(self.blocks[-1])
            else:
                self._cursor = (a for block in self.blocks for a in self._walk(block))

    def give_back(self, address: str) -> None:
        self._in_use.discard(address)

    def release(self) -> None:
        for block in self.blocks:
            block.release()


def check_ports(address: str, ports: Mapping[str, int]) -> None:
    """Raise ``PortTaken`` if something listens already where a pod will.

    The addresses are ours alone, so that can only be a server on all addresses (0.0.0.0 or ::).
    """
    for port in sorted(set(ports.values())):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As servers do, so that a connection in TIME_WAIT is no conflict.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                probe.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    owner = listener(port)
                    raise PortTaken(
                        f"port {port} is in use on all addresses{f' by {owner}' if owner else ''}; "
                        f"pods need it on {address}: stop that program, or have it listen on "
                        "127.0.0.1 only"
                    ) from error
                if error.errno == errno.EACCES:
                    raise PortTaken(f"port {port} needs root; pods run as you") from error
                raise


def listener(port: int) -> str:
    """The program that listens on ``port``: "name (pid N)", or "" if it can't be seen."""
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            columns = row.split()
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{columns[9]}]")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(_target(link) in inodes for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return ""


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""  # closed meanwhile
