"""Tokenizing a conversation's next turn without tokenizing its earlier turns again.

A chat is text between special tokens. Where a tokenizer cuts its input at those tokens before it
does anything else, the tokens of each stretch depend on that stretch alone, so they can be kept.
The cut must be provable from `tokenizer.json`; any other tokenizer is run in full.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]

_ENTRY_OVERHEAD = 320  # bytes of a dict entry, a str header and an array header

# Pre-tokenizers whose output for a stretch of text does not depend on where the stretch stands.
_LOCAL_PRE_TOKENIZERS = frozenset(
    {
        "BertPreTokenizer",
        "CharDelimiterSplit",
        "Digits",
        "FixedLength",
        "Punctuation",
        "Split",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    }
)
_LOCAL_NORMALIZERS = frozenset(
    {
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Lowercase",
        "Replace",
        "Nmt",
        "Precompiled",
        "StripAccents",
        "BertNormalizer",
        "ByteLevel",
    }
)
_MODELS = frozenset(("BPE", "WordLevel", "WordPiece", "Unigram"))


def proves_segmentation(tokenizer_json: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether text may be cut at the added tokens, and why (not).

    Conditions: added tokens to cut at are matched before normalization and take no neighbouring
    characters (`normalized`, `lstrip`, `rstrip`, `single_word` all false); normalizer and
    pre-tokenizer treat a stretch alike wherever it stands and put nothing before it; the model is
    deterministic.
    """
    model = tokenizer_json.get("model") or {}
    if model.get("type", "BPE") not in _MODELS:
        return False, f"model {model.get('type')} is not known"
    if model.get("dropout"):
        return False, "the model drops merges at random"
    added = tokenizer_json.get("added_tokens") or []
    for token in added:
        for rule in ("lstrip", "rstrip", "single_word"):
            if token.get(rule):
                return False, f"added token {token.get('content')!r} has {rule}"
    if not boundaries(tokenizer_json):
        return False, "no added token is matched before normalization"
    for normalizer in _flatten(tokenizer_json.get("normalizer"), "normalizers"):
        if normalizer.get("type") not in _LOCAL_NORMALIZERS:
            return False, f"normalizer {normalizer.get('type')} is not known to be local"
    for step in _flatten(tokenizer_json.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "ByteLevel":
            if step.get("add_prefix_space", True):
                return False, "ByteLevel adds a prefix space"
        elif kind not in _LOCAL_PRE_TOKENIZERS:
            return False, f"pre-tokenizer {kind} is not known to be local"
    return True, "added tokens cut the text before normalization, and every step is local"


def boundaries(tokenizer_json: Mapping[str, Any]) -> dict[str, int]:
    """Added tokens that are matched in the raw text: content → id."""
    return {
        token["content"]: token["id"]
        for token in tokenizer_json.get("added_tokens") or []
        if token.get("content") and not token.get("normalized")
    }


def _flatten(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [inner for one in step.get(key) or [] for inner in _flatten(one, key)]
    return [step]


class SegmentCache:
    """Tokens of stretches of text between added tokens, least recently used ones dropped.

    ``encode`` tokenizes stretches that hold no added token, all of a prompt's new ones at once;
    ``limit`` bounds the cache in bytes (texts, arrays and a fixed overhead an entry). Not safe for
    several threads at once: `Tokenizer` holds a lock around it.
    """

    def __init__(
        self,
        added: Mapping[str, int],
        encode: Callable[[list[str]], list[Tokens]],
        limit: int = 64 << 20,
    ) -> None:
        # Longest first: the leftmost-longest match that the tokenizers library makes.
        contents = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, contents)) + ")").split
        self._added = {
            content: np.array([token], dtype=np.uint32) for content, token in added.items()
        }
        self._encode = encode
        self._limit = limit
        self._entries: OrderedDict[str, Tokens] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def pieces(self, text: str) -> list[str]:
        """The text cut at added tokens; those stand at the odd places."""
        return self._split(text)

    def missing(self, pieces: list[str]) -> int:
        """Characters that would have to be tokenized."""
        entries = self._entries
        return sum(len(piece) for piece in pieces[::2] if piece and piece not in entries)

    def tokens(self, pieces: list[str]) -> Tokens:
        """The concatenated tokens: equal to tokenizing the whole text at once."""
        added, entries = self._added, self._entries
        missing = [piece for piece in pieces[::2] if piece and piece not in entries]
        fresh = self._tokenize(missing) if missing else {}
        parts: list[Tokens] = []
        for index, piece in enumerate(pieces):
            if index & 1:
                parts.append(added[piece])
            elif piece:
                found = fresh.get(piece)
                if found is None:
                    found = entries[piece]
                    entries.move_to_end(piece)
                    self.hits += 1
                parts.append(found)
        if fresh:
            self._keep(fresh)
        if not parts:
            return np.empty(0, dtype=np.uint32)
        return np.concatenate(parts)

    def _tokenize(self, missing: list[str]) -> dict[str, Tokens]:
        unique = list(dict.fromkeys(missing))
        self.misses += len(unique)
        return dict(zip(unique, self._encode(unique), strict=True))

    def _keep(self, fresh: dict[str, Tokens]) -> None:
        for piece, tokens in fresh.items():
            size = _size(piece, tokens)
            if size > self._limit // 4:
                continue  # one huge document must not push everything else out
            self._entries[piece] = tokens
            self.bytes += size
        while self.bytes > self._limit:
            self.bytes -= _size(*self._entries.popitem(last=False))

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)


def _size(piece: str, tokens: Tokens) -> int:
    width = 1 if piece.isascii() else 4  # a str takes 1, 2 or 4 bytes a character
    return len(piece) * width + tokens.nbytes + _ENTRY_OVERHEAD
