"""Cut and kept, a text has the tokens it has as a whole; where that is not sure, nothing is cut."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from dynamo_epp.requests import ChatPrompt
from dynamo_epp.tokenize import SegmentCache, Tokenizer, proves_segmentation
from dynamo_epp.tokenize.segments import Tokens, boundaries
from dynamo_workers.tiny import TOKENIZER_FILES, TOKENIZER_FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

FILES = {name: (TOKENIZER_FOLDER / name).read_bytes() for name in TOKENIZER_FILES}
DEFINITION: dict[str, Any] = json.loads(FILES["tokenizer.json"])
ADDED = [token["content"] for token in DEFINITION["added_tokens"]]
CUTTING, WHOLE = Tokenizer.from_files(FILES, {}), Tokenizer.from_files(FILES, {})
WHOLE.disable_segments()

stretches = st.one_of(
    st.sampled_from(ADDED),
    st.sampled_from([token[:-1] for token in ADDED] + [token[1:] for token in ADDED]),
    st.text(max_size=6),
    st.sampled_from([" ", "\n\n", " the", "e\u0301", "漢字", "👩‍👧", "<|", "|>", "don't", "12345"]),
)
texts = st.lists(stretches, max_size=12).map("".join)


@given(texts)
@settings(max_examples=200, deadline=None)
def test_cut_texts_have_the_same_tokens(text: str) -> None:
    assert CUTTING.encode_text(text, False).tolist() == WHOLE.encode_text(text, False).tolist()


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}, {"type": "Lowercase"}])
@given(texts, st.lists(st.booleans(), min_size=len(ADDED), max_size=len(ADDED)))
@settings(max_examples=30, deadline=None)
def test_normalized_added_tokens(normalizer: Any, text: str, normalized: list[bool]) -> None:
    """Tokens matched after normalization, in any mixture with those matched before."""
    definition = {**DEFINITION, "normalizer": normalizer}
    definition["added_tokens"] = [
        {**token, "normalized": after}
        for token, after in zip(DEFINITION["added_tokens"], normalized, strict=True)
    ]
    ours = Tokenizer.from_files({"tokenizer.json": json.dumps(definition).encode()}, {})
    backend = Backend.from_str(json.dumps(definition))
    for _ in range(2):  # tokenized, then kept
        assert (
            ours.encode_text(text, False).tolist()
            == backend.encode(text, add_special_tokens=False).ids
        )


def test_a_growing_conversation_costs_what_is_new() -> None:
    ours, whole = Tokenizer.from_files(FILES, {}), WHOLE
    messages: list[dict[str, str]] = [{"role": "system", "content": "a long system prompt " * 20}]
    for turn in range(10):
        messages.append({"role": "user", "content": f"question {turn} " * 10})
        prompt = ChatPrompt(messages=list(messages))
        text = ours.render(prompt)
        new = ours.uncached(text)
        assert new <= len(messages[-1]["content"]) + len("answer 0 " * 10) + (
            420 if not turn else 0
        )
        assert np.array_equal(ours.encode_chat(prompt), whole.encode_chat(prompt))
        assert ours.uncached(text) == 0
        messages.append({"role": "assistant", "content": f"answer {turn} " * 10})


def added(**rules: Any) -> dict[str, Any]:
    token = {"id": 1, "content": "<a>", "normalized": False, "special": True, **rules}
    return {"model": {"type": "BPE"}, "added_tokens": [token]}


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (added(lstrip=True), "lstrip"),
        (added(rstrip=True), "rstrip"),
        (added(single_word=True), "single_word"),
        ({**added(normalized=True), "normalizer": {"type": "NFC"}}, "before normalization"),
        ({"model": {"type": "BPE"}}, "before normalization"),
        ({**added(), "model": {"type": "BPE", "dropout": 0.1}}, "random"),
        ({**added(), "model": {"type": "Mystery"}}, "Mystery"),
        ({**added(), "normalizer": {"type": "Prepend", "prepend": "▁"}}, "Prepend"),
        ({**added(), "pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
        ({**added(), "pre_tokenizer": {"type": "ByteLevel"}}, "prefix space"),
        (
            {
                **added(),
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True}],
                },
            },
            "prefix space",
        ),
    ],
)
def test_conditions_that_do_not_hold(definition: dict[str, Any], reason: str) -> None:
    holds, why = proves_segmentation(definition)
    assert not holds
    assert reason in why


def test_a_prefix_space_would_show() -> None:
    """The condition is no formality: this tokenizer gives other tokens when it is cut."""
    step = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    definition = {**DEFINITION, "pre_tokenizer": step}
    ours = Tokenizer.from_files({"tokenizer.json": json.dumps(definition).encode()}, {})
    assert "prefix space" in ours.segmentation
    backend = Backend.from_str(json.dumps(definition))
    text = f"a{ADDED[0]}b"
    assert (
        ours.encode_text(text, False).tolist() == backend.encode(text, add_special_tokens=False).ids
    )


def test_the_bundled_tokenizer_proves_them() -> None:
    assert proves_segmentation(DEFINITION)[0]
    assert "cut the text" in CUTTING.segmentation


class Counting:
    """Stands in for a tokenizer: one token a character, and a list of what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, stretches: list[str]) -> list[Tokens]:
        self.asked += stretches
        return [np.array([ord(c) for c in text], dtype=np.uint32) for text in stretches]


def test_least_recently_used_stretches_go_first() -> None:
    encode = Counting()
    cache = SegmentCache(({"|": 0}, {}), encode, limit=1400)
    for text in ("a|b|c", "d|a|e", "f|a"):
        tokens = cache.tokens(cache.pieces(text))
        assert tokens.tolist() == [0 if c == "|" else ord(c) for c in text]
        assert cache.bytes <= 1400
    assert encode.asked == ["a", "b", "c", "d", "e", "f"]
    assert cache.missing(["a", "|", "b"]) == 1  # "b" was dropped, "a" is used all the time
    assert (cache.hits, cache.misses) == (2, 6)


def test_one_huge_stretch_is_not_kept() -> None:
    encode = Counting()
    cache = SegmentCache(({"|": 0}, {}), encode, limit=4000)
    cache.tokens(["small"])
    cache.tokens(["x" * 5000])
    assert (len(cache), cache.missing(["small"])) == (1, 0)


def test_the_longest_added_token_wins() -> None:
    definition = added()
    definition["added_tokens"] += [
        {"id": 2, "content": "<a><b>", "normalized": False},
        {"id": 3, "content": "<", "normalized": True},
    ]
    cache = SegmentCache(boundaries(definition), Counting())
    assert cache.pieces("<a><b><a><c") == ["", "<a><b>", "", "<a>", "", "<", "c"]


def test_threads_do_not_disturb_each_other() -> None:
    ours = Tokenizer.from_files(FILES, {})
    texts = [
        f"<|user|>question {n % 7}<|end|><|assistant|>answer {n}<|end|>" * 3 for n in range(60)
    ]
    expected = [WHOLE.encode_text(text, False).tolist() for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: ours.encode_text(text, False).tolist(), texts * 5))
    assert found == expected * 5
