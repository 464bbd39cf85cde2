"""A reader who is slow gets its whole answer from pods that have nothing else to do any more."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from e2e.operator import graphs
from e2e.operator.space import Space
from e2e.operator_kinds.chat import ANSWER_S

GRAPH = "drain"
TOKENS = 3000
"""Of an answer that fits into the buffers between an engine and a reader who takes none of it."""


@pytest.fixture
def quick(space: Space) -> Iterator[Space]:
    """The namespace, and a graph whose engine answers at once, ready."""
    space.apply(graphs.graph(GRAPH, graphs.frontend(), graphs.worker(1, "--speed", "0")))
    space.wait_ready(GRAPH)
    yield space
    space.kubectl("delete", "dgd", GRAPH, "--ignore-not-found")


def request(host: str) -> bytes:
    """A streamed chat of so many tokens, on the wire."""
    body = json.dumps(
        {
            "model": graphs.MODEL,
            "messages": [{"role": "user", "content": "Go on and on."}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        "",
        body,
    )
    return "\r\n".join(lines).encode()


def take(reader: socket.socket, hurry: threading.Event) -> bytes:
    """All that comes: 80 kB a second at most, until there is a hurry."""
    answer = b""
    while part := reader.recv(8192):
        answer += part
        hurry.wait(0.1)
    return answer


@pytest.mark.timeout(240)
def test_pods_stay_until_their_last_answer_is_taken(quick: Space) -> None:
    url = urlsplit(quick.url(GRAPH))
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        reader.settimeout(ANSWER_S)
        reader.connect((url.hostname, url.port))
        reader.sendall(request(url.netloc))
        answer = reader.recv(1024)
        assert answer.startswith(b"HTTP/1.1 200 ")

        hurry = threading.Event()
        with ThreadPoolExecutor() as pool:
            taken = pool.submit(take, reader, hurry)
            try:
                quick.kubectl("delete", "dgd", GRAPH)
                quick.until(
                    lambda: not quick.pods(GRAPH, "Worker", ending=True), "the worker has ended"
                )
                assert not taken.done()
            finally:
                hurry.set()
        answer += taken.result()
    assert b"data: [DONE]" in answer[-64:]
    assert f'"completion_tokens":{TOKENS}'.encode() in answer[-1024:]
    quick.until(lambda: not quick.pods(GRAPH, ending=True), "no pod left")
