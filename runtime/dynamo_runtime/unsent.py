"""Bytes of answers that readers have not taken yet, in the kernel's buffers.

An answer that its server has finished may lie in a socket's buffer for as long as its reader is
slow: megabytes of it. A pod's network goes when its processes have ended, and with it what was not
sent by then; the reader gets no end of the connection either and waits for ever. So whoever drains
waits for these bytes, too.

Linux only: elsewhere nothing is known of them and nothing is waited for. Source:
https://docs.kernel.org/networking/proc_net_tcp.html
"""

from __future__ import annotations

import asyncio
import ipaddress
import sys
import time
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
STALL_S = 30.0
"""A reader that takes nothing for so long has gone."""
POLL_S = 0.1
_LISTENING = "0A"  # its queue counts connections


async def until_sent(host: str, port: int, limit_s: float, stall_s: float = STALL_S) -> int:
    """Wait until connections to this server have delivered everything: at most `limit_s`, and
    `stall_s` without progress. How many bytes are left.

    `host` is what the server is bound to. A server that still runs may have more in its own
    buffers, which follows at once where there is room; so all has to be gone twice in a row.
    """
    began = moved = time.monotonic()
    left = unsent(host, port)
    empty = not left
    while True:
        await asyncio.sleep(POLL_S)
        now, before, left = time.monotonic(), left, unsent(host, port)
        if empty and not left:
            return 0
        empty = not left
        if left != before:
            moved = now
        if now - began >= limit_s or now - moved >= stall_s:
            return left


def unsent(host: str, port: int) -> int:
    """Bytes that connections to `host`:`port` of this network namespace have not delivered now."""
    total = 0
    for path in TABLES:
        try:
            total += unsent_in(path.read_text(), host, port)
        except OSError:
            continue
    return total


def unsent_in(table: str, host: str, port: int) -> int:
    """The same, of the text of one of the kernel's tables."""
    suffix = _suffix(host)
    total = 0
    for line in table.splitlines()[1:]:
        fields = line.split()
        local, number = fields[1].split(":")
        # The end: an IPv4 address is also the end of the IPv6 one that it is mapped to.
        if int(number, 16) == port and local.endswith(suffix) and fields[3] != _LISTENING:
            total += int(fields[4].split(":")[0], 16)
    return total


def _suffix(host: str) -> str:
    """How the address ends that the kernel prints: words of four bytes, each a number of this
    machine. "" for a host that is every address, or a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if address.is_unspecified:
        return ""
    packed = address.packed
    words = (packed[start : start + 4] for start in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
