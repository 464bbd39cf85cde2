"""The endpoints file: what is written is read, and a bad file never empties the pool."""

import asyncio
import logging
import tempfile
from pathlib import Path

import pytest
from dynamo_runtime.discovery import (
    Endpoint,
    FileEndpointSource,
    InvalidEndpoints,
    read_endpoints,
    write_endpoints,
)
from hypothesis import given
from hypothesis import strategies as st

ONE = Endpoint("w-0", "127.0.0.2", 8000, ready=True, stream_port=5557, labels={"a": "b"})
TWO = Endpoint("w-1", "127.0.0.3", 8000, role="decode", terminating=True, generation="abc")


def test_hostport() -> None:
    assert ONE.hostport == "127.0.0.2:8000"
    assert Endpoint("w", "::1", 8000).hostport == "[::1]:8000"


@given(st.lists(st.sampled_from([ONE, TWO]), unique_by=lambda e: e.name))
def test_round_trip(endpoints: list[Endpoint]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "endpoints.json"
        write_endpoints(path, endpoints)
        assert read_endpoints(path) == tuple(endpoints)
        assert [p.name for p in path.parent.iterdir()] == ["endpoints.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "endpoints.json: "),
        ('{"endpoints": [{"name": "a"}]}', r"missing required field `address`.*endpoints\[0\]"),
        (
            '{"endpoints": [{"name": "a", "address": "::1", "port": 1, "role": "worke"}]}',
            "endpoint 'a': role 'worke' is unknown; use one of worker, prefill, decode",
        ),
        (
            '{"endpoints": [{"name": "a", "address": "::1", "port": 99999}]}',
            "endpoint 'a': port is 99999; it must be from 1 to 65535",
        ),
        (
            '{"endpoints": [{"name": "a", "address": "::1", "port": 1, "stream_port": 0}]}',
            "endpoint 'a': stream_port is 0",
        ),
        (
            '{"endpoints": [{"name": "a", "address": "engine.local", "port": 1}]}',
            "endpoint 'a': address 'engine.local' is no IP address",
        ),
        (
            '{"endpoints": [{"name": "a", "address": "::1", "port": 1},'
            '{"name": "a", "address": "::2", "port": 1}]}',
            "two endpoints are named 'a'",
        ),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "endpoints.json"
    path.write_text(text)
    with pytest.raises(InvalidEndpoints, match=message):
        read_endpoints(path)


async def test_snapshots_follow_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "endpoints.json"
    snapshots = FileEndpointSource(path, interval_s=0.005).snapshots()

    async def following() -> tuple[Endpoint, ...]:
        return await asyncio.wait_for(anext(snapshots), 5)

    assert await following() == ()  # no file yet
    write_endpoints(path, [ONE])
    assert await following() == (ONE,)
    complained = asyncio.Event()

    def notice(record: logging.LogRecord) -> bool:
        assert "keeping the last good endpoints" in record.getMessage()
        complained.set()
        return True

    monkeypatch.setattr(logging.getLogger("dynamo_runtime.discovery.file"), "filters", [notice])
    path.write_text("not json")
    reader = asyncio.ensure_future(following())
    await asyncio.wait_for(complained.wait(), 5)
    assert not reader.done()
    write_endpoints(path, [ONE, TWO])
    assert await reader == (ONE, TWO)
    await snapshots.aclose()  # type: ignore[attr-defined]


async def test_a_file_that_can_not_be_read_does_not_end_the_watch(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.json"
    path.mkdir()
    snapshots = FileEndpointSource(path, interval_s=0.005).snapshots()

    async def following() -> tuple[Endpoint, ...]:
        return await asyncio.wait_for(anext(snapshots), 5)

    assert await following() == ()
    path.rmdir()
    write_endpoints(path, [ONE])
    assert await following() == (ONE,)
    await snapshots.aclose()  # type: ignore[attr-defined]
