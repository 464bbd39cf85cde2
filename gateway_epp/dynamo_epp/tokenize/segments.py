"""Tokenizing a conversation's next turn without tokenizing its earlier turns again.

A chat is text between special tokens. Where a tokenizer cuts its input at those tokens before it
does anything else, the tokens of each stretch depend on that stretch alone, so they can be kept.
The cut must be provable from `tokenizer.json`; any other tokenizer is run in full.
"""

from __future__ import annotations

import re
import threading
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
    if not any(boundaries(tokenizer_json)):
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


def boundaries(tokenizer_json: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Added tokens to cut at, content → id: those matched first, and those matched within the rest.

    The library matches tokens that are not `normalized` in the raw text, and the others in what
    lies between, once that is normalized. The second kind can be cut at where there is nothing to
    normalize.
    """
    added = [token for token in tokenizer_json.get("added_tokens") or [] if token.get("content")]
    first = {token["content"]: token["id"] for token in added if not token.get("normalized")}
    if _flatten(tokenizer_json.get("normalizer"), "normalizers"):
        return first, {}
    return first, {token["content"]: token["id"] for token in added if token.get("normalized")}


def _flatten(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [inner for one in step.get(key) or [] for inner in _flatten(one, key)]
    return [step]


class SegmentCache:
    """Tokens of stretches of text between added tokens, least recently used ones dropped.

    ``added`` are the tokens to cut at, as `boundaries` gives them. ``encode`` tokenizes stretches
    that hold no added token, all of a prompt's new ones at once; ``limit`` bounds the cache in
    bytes (texts, arrays and a fixed overhead an entry). Safe across threads; none waits for
    another's ``encode``.
    """

    def __init__(
        self,
        added: tuple[Mapping[str, int], Mapping[str, int]],
        encode: Callable[[list[str]], list[Tokens]],
        limit: int = 64 << 20,
    ) -> None:
        first, second = added
        self._first = _splitter(first)
        self._second = _splitter(second)
        self._added = {
            content: np.array([token], dtype=np.uint32)
            for content, token in {**second, **first}.items()
        }
        self._encode = encode
        self._limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, Tokens] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def pieces(self, text: str) -> list[str]:
        """The text cut at added tokens; those stand at the odd places."""
        pieces = [text] if self._first is None else self._first(text)
        if self._second is None:
            return pieces
        finer: list[str] = []
        for index, piece in enumerate(pieces):
            if index & 1:
                finer.append(piece)
            else:
                finer += self._second(piece)
        return finer

    def missing(self, pieces: list[str]) -> int:
        """Characters that would have to be tokenized."""
        entries = self._entries
        return sum(len(piece) for piece in pieces[::2] if piece and piece not in entries)

    def tokens(self, pieces: list[str]) -> Tokens:
        """The concatenated tokens: equal to tokenizing the whole text at once."""
        known: dict[str, Tokens] = {}
        fresh: list[str] = []
        with self._lock:
            entries = self._entries
            for piece in dict.fromkeys(pieces[::2]):
                found = entries.get(piece)
                if found is not None:
                    entries.move_to_end(piece)
                    known[piece] = found
                elif piece:
                    fresh.append(piece)
            self.hits += len(known)
            self.misses += len(fresh)
        if fresh:
            new = dict(zip(fresh, self._encode(fresh), strict=True))
            known |= new
            with self._lock:
                self._keep(new)
        added = self._added
        parts = [
            added[piece] if index & 1 else known[piece]
            for index, piece in enumerate(pieces)
            if piece
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)

    def _keep(self, new: dict[str, Tokens]) -> None:
        for piece, tokens in new.items():
            size = _size(piece, tokens)
            if size > self._limit // 4 or piece in self._entries:
                continue  # one huge document must not push everything else out
            self._entries[piece] = tokens
            self.bytes += size
        while self.bytes > self._limit:
            self.bytes -= _size(*self._entries.popitem(last=False))

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)


def _splitter(added: Mapping[str, int]) -> Callable[[str], list[str]] | None:
    """Cuts text at these tokens; alternatives longest first: the library's leftmost-longest."""
    if not added:
        return None
    contents = sorted(added, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, contents)) + ")").split


def _size(piece: str, tokens: Tokens) -> int:
    width = 1 if piece.isascii() else 4  # a str takes 1, 2 or 4 bytes a character
    return len(piece) * width + tokens.nbytes + _ENTRY_OVERHEAD
