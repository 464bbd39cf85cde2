"""The client's name for a model in relayed answers: found wherever chunks are cut, nothing lost."""

from __future__ import annotations

import json
import re

import pytest
from dynamo_epp.extproc.restore import ModelRestorer, can_restore
from hypothesis import given
from hypothesis import strategies as st

ENGINE, ASKED = "org/engine-é", 'm"1'


def restored(data: bytes, cuts: list[int], *, engine: str = ENGINE, asked: str = ASKED) -> bytes:
    restorer = ModelRestorer(engine, asked)
    edges = sorted({min(cut, len(data)) for cut in cuts})
    parts = [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]
    out = [restorer.feed(part, False) for part in parts]
    return b"".join([*out, restorer.flush()])


def whole(data: bytes) -> bytes:
    """The same in one go, by the rule as a regular expression."""
    names = "|".join(re.escape(json.dumps(ENGINE, ensure_ascii=flag)) for flag in (True, False))
    pattern = re.compile(rb'(?<!\\)("model"[ \t\r\n]{0,8}:[ \t\r\n]{0,8})(?:%b)' % names.encode())
    return pattern.sub(lambda found: found[1] + json.dumps(ASKED).encode(), data)


PIECES = st.sampled_from(
    [
        b'"model":' + json.dumps(ENGINE).encode(),
        b'"model" : ' + json.dumps(ENGINE, ensure_ascii=False).encode(),
        b'"model":"other"',
        b'\\"model\\":\\"' + ENGINE.encode() + b'\\"',
        b'\\"model":' + json.dumps(ENGINE).encode(),
        b'"model"' + b" " * 9 + b":" + json.dumps(ENGINE).encode(),
        b'"mod',
        b'"',
        b"\\",
        b" ",
        b'"model":',
        b"data: {",
        b"}\n\n",
    ]
)


@given(st.lists(PIECES, max_size=12).map(b"".join), st.lists(st.integers(0, 400), max_size=12))
def test_cuts_make_no_difference(data: bytes, cuts: list[int]) -> None:
    assert restored(data, cuts) == whole(data)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8))
def test_what_has_no_model_stays_as_it_is(data: bytes, cuts: list[int]) -> None:
    assert restored(data, cuts) == data


def test_an_event_goes_out_whole() -> None:
    event = b'data: {"id":"1","model":"engine","choices":[]}\n\n'
    restorer = ModelRestorer("engine", "asked")
    assert restorer.feed(event, False) == event.replace(b'"engine"', b'"asked"')
    assert restorer.feed(b'data: {"model":"eng', False) == b"data: {"
    assert restorer.feed(b'ine"}', False) == b'"model":"asked"}'
    assert restorer.feed(b'"model', True) == b'"model'


def test_text_that_looks_alike_is_not_touched() -> None:
    body = json.dumps({"model": ENGINE, "text": json.dumps({"model": ENGINE})}).encode()
    assert json.loads(restored(body, [])) == {"model": ASKED, "text": json.dumps({"model": ENGINE})}


@pytest.mark.parametrize(
    ("content_type", "encoding", "can"),
    [
        ("application/json", "", True),
        ("Application/JSON; charset=utf-8", "identity", True),
        ("text/event-stream", "", True),
        ("application/json", "gzip", False),
        ("text/html", "", False),
        ("", "", False),
    ],
)
def test_which_answers_are_looked_into(content_type: str, encoding: str, can: bool) -> None:
    assert can_restore(content_type, encoding) is can
