"""What the simulated model says: a pure function of the model's name and the prompt's tokens.

So the same request has the same answer on every worker, direct or through a router, and two
answers can be compared byte for byte. An answer is made of words that are one token each and
encode to that token again: in the next turn of a conversation the text comes back as exactly the
tokens that were produced, and their cached blocks are found.
"""

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynamo_workers.sim.chat import ModelFolderError, Renderer

SHORTEST, LONGEST = 24, 152
"""Tokens of an answer that ends by itself, the end token included."""

ENOUGH_WORDS = 600
FEWEST_WORDS = 16
DIMENSIONS = 64
"""Length of an embedding."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens, the text that each adds, and why the answer ends where it does."""

    tokens: list[int]
    pieces: list[str]
    finish_reason: str  # "stop" or "length"
    stop_reason: str | int | None  # the stop string or token that ended it


class AnswerBook:
    """The answers of one model, given its vocabulary."""

    def __init__(self, model: str, renderer: Renderer) -> None:
        self._model = model.encode()
        self._end = renderer.end_id
        self._pieces: dict[int, str] = {}
        self._first: list[int] = []
        self._words: list[int] = []
        self._collect_words(renderer)
        self._word_ids = np.asarray(self._words)

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        index: int = 0,
        adapter: str = "",
        min_tokens: int = 0,
        ignore_eos: bool = False,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        include_stop: bool = False,
    ) -> Answer:
        """The `index`-th answer to `prompt`, of the LoRA adapter of this name if there is one;
        shorter limits give a prefix of longer ones."""
        seed = self._seed(prompt, index, adapter)
        natural = max(SHORTEST + seed % (LONGEST - SHORTEST + 1), min_tokens + 1)
        ends = self._end is not None and not ignore_eos and natural <= max_tokens
        count = natural - 1 if ends else max_tokens
        numbers = _mixed(seed, count)
        words = self._word_ids[numbers % np.uint64(len(self._words))]
        tokens: list[int] = words.tolist()
        if tokens:
            tokens[0] = self._first[int(numbers[0]) % len(self._first)]
        pieces = [self._pieces[token] for token in tokens]
        reason = "length"
        if ends and self._end is not None:
            tokens.append(self._end)
            pieces.append("")
            reason = "stop"
        if stop or stop_token_ids:
            cut = _stopped(tokens, pieces, stop, stop_token_ids, min_tokens, include_stop)
            if cut is not None:
                return cut
        return Answer(tokens, pieces, reason, None)

    def embedding(self, prompt: Sequence[int], dimensions: int, adapter: str = "") -> list[float]:
        """A vector of length 1 that depends on every token of the prompt."""
        numbers = _mixed(self._seed(prompt, 0, adapter), dimensions)
        values = (numbers >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1.0
        unit: list[float] = (values / np.linalg.norm(values)).astype(np.float32).tolist()
        return unit

    def _seed(self, prompt: Sequence[int], index: int, adapter: str) -> int:
        digest = hashlib.blake2b(self._model, digest_size=8, salt=index.to_bytes(8, "little"))
        digest.update(adapter.encode())
        digest.update(array("I", prompt).tobytes())
        return int.from_bytes(digest.digest(), "little")

    def _collect_words(self, renderer: Renderer) -> None:
        tokenizer = renderer.tokenizer
        anchor: list[int] | None = None
        for token in range(tokenizer.get_vocab_size(with_added_tokens=False)):
            text = renderer.decode([token])
            if anchor is None or len(self._first) < ENOUGH_WORDS:
                start = re.fullmatch(r"[A-Z][a-z]{2,}", text) is not None
                if start and renderer.encode(text, special=False) == [token]:
                    self._first.append(token)
                    self._pieces[token] = text
                    anchor = anchor or [token]
            if len(self._words) >= ENOUGH_WORDS:
                break
        for token in range(tokenizer.get_vocab_size(with_added_tokens=False)):
            if anchor is None or len(self._words) >= ENOUGH_WORDS:
                break
            before = self._pieces[anchor[0]]
            after = renderer.decode([*anchor, token])
            text = after.removeprefix(before)
            if re.fullmatch(r" [a-z]{3,}", text) is None or token in self._pieces:
                continue
            if renderer.encode(after, special=False) == [*anchor, token]:
                self._words.append(token)
                self._pieces[token] = text
        if len(self._words) < FEWEST_WORDS or not self._first:
            raise ModelFolderError(
                f"the tokenizer has {len(self._words)} tokens that are a word, and answers are "
                f"made of at least {FEWEST_WORDS}; use another tokenizer"
            )


def _mixed(seed: int, count: int) -> NDArray[np.uint64]:
    """`count` numbers of the splitmix64 sequence that starts at `seed`."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _stopped(
    tokens: list[int],
    pieces: list[str],
    stop: Sequence[str],
    stop_token_ids: Sequence[int],
    min_tokens: int,
    include: bool,
) -> Answer | None:
    """The answer up to the first stop string or token, or None if none occurs in it."""
    text = ""
    for position, (token, piece) in enumerate(zip(tokens, pieces, strict=True)):
        searched = len(text)
        text += piece
        count = position + 1
        if count < min_tokens:
            continue
        if token in stop_token_ids:
            shown = pieces[:count] if include else [*pieces[:position], ""]
            return Answer(tokens[:count], shown, "stop", token)
        for word in stop:
            # A stop string ends in this piece: it may have begun in earlier ones.
            begin = text.find(word, max(0, searched - len(word) + 1))
            if begin >= 0:
                end = begin + len(word) if include else begin
                return Answer(tokens[:count], _cut(pieces[:count], end), "stop", word)
    return None


def _cut(pieces: list[str], length: int) -> list[str]:
    """The pieces, their text shortened to `length` characters."""
    result = []
    for piece in pieces:
        result.append(piece[:length])
        length = max(0, length - len(piece))
    return result
