"""Transfer parameters that a client sends never reach an engine; nothing else is touched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dynamo_epp.requests import parse, replace_model, strip_kv_transfer_params
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"kv_transfer_params": {"do_remote_prefill": true}, "a": 1.50}', b'{"a":1.50}'),
        (b'{"a":1,"kv_transfer_params":null}', b'{"a":1}'),
        (rb'{"kv\u005ftransfer_params":1,"a":"\u00e9"}', rb'{"a":"\u00e9"}'),
        (b'{"ec_transfer_params":{},"a":[ 1 ]}', b'{"a":[ 1 ]}'),
        (b'{"vllm_xargs":{"kv_transfer_params":"x","b":2}}', b'{"vllm_xargs":{"b":2}}'),
        (b'{"vllm_xargs": 3, "kv_transfer_params": 1}', b'{"vllm_xargs":3}'),
    ],
)
def test_stripped(content: bytes, expected: bytes) -> None:
    assert strip_kv_transfer_params(content) == expected


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}',
        b'{"messages": [{"content": "kv_transfer_params"}]}',
        b'{"extra_body": {"kv_transfer_params": 1}}',  # vLLM reads no such field
        b'{"vllm_xargs": {"b": 2}}',
        b"not json",
        b'["kv_transfer_params"]',
    ],
)
def test_bodies_without_them_stay_as_they_are(content: bytes) -> None:
    assert strip_kv_transfer_params(content) is None


def test_bodies_that_only_python_reads_are_stripped_too() -> None:
    stripped = strip_kv_transfer_params(b'{"x": NaN, "s": "\\ud800", "kv_transfer_params": {}}')
    assert stripped is not None
    assert list(json.loads(stripped)) == ["x", "s"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["kv_transfer_params", "ec_transfer_params", "vllm_xargs", "model", "prompt", "ü"]


@given(
    st.dictionaries(
        st.sampled_from(KEYS),
        values | st.dictionaries(st.sampled_from(KEYS), values, max_size=3),
        max_size=6,
    ),
    st.booleans(),
)
def test_against_the_model(fields: dict[str, Any], ascii_only: bool) -> None:
    content = json.dumps(fields, ensure_ascii=ascii_only).encode()
    expected = {key: value for key, value in fields.items() if "transfer" not in key}
    extra = expected.get("vllm_xargs")
    if isinstance(extra, dict):
        kept = {key: value for key, value in extra.items() if "transfer" not in key}
        expected["vllm_xargs"] = kept
    stripped = strip_kv_transfer_params(content)
    if expected == fields:
        assert stripped is None
    else:
        assert stripped is not None
        assert json.loads(stripped) == expected
        assert strip_kv_transfer_params(stripped) is None


def test_parse_announces_them() -> None:
    for fields in ({"kv_transfer_params": None}, {"vllm_xargs": {"ec_transfer_params": 1}}):
        content = json.dumps({"model": "m", "prompt": "a", **fields}).encode()
        assert parse("/v1/completions", content).has_kv_transfer_params
    assert not parse("/v1/completions", b'{"model":"m","prompt":"a"}').has_kv_transfer_params


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"model": "a", "n": 1.50}', b'{"model":"b\\"","n":1.50}'),
        (b'{"n": [ 1 ] , "model":"a"}', b'{"n":[ 1 ],"model":"b\\""}'),
        (rb'{"mo\u0064el":"a","t":"\u00e9"}', rb'{"model":"b\"","t":"\u00e9"}'),
        (b'{"model":"a","model":"c"}', b'{"model":"b\\""}'),
    ],
)
def test_another_model(content: bytes, expected: bytes) -> None:
    assert replace_model(content, 'b"') == expected


def test_another_model_in_a_body_that_only_python_reads() -> None:
    replaced = json.loads(replace_model(b'{"x": NaN, "s": "\\ud800", "model": "a"}', "b"))
    assert (replaced["model"], replaced["s"], list(replaced)) == (
        "b",
        "\ud800",
        ["x", "s", "model"],
    )


@given(st.dictionaries(st.text(max_size=4), values, max_size=4), st.text(max_size=8))
def test_all_other_fields_stay(fields: dict[str, Any], model: str) -> None:
    content = json.dumps({**fields, "model": "a"}).encode()
    assert json.loads(replace_model(content, model)) == {**fields, "model": model}
