"""The conversation that is tokenized: ten turns, about 2,000 tokens, the same in every run."""

from __future__ import annotations

import random
from typing import Any

from dynamo_epp.requests import ChatPrompt
from dynamo_workers.tiny.corpus import COMMON_WORDS

TURNS = 10
_QUESTION_WORDS, _ANSWER_WORDS, _SYSTEM_WORDS = 40, 130, 150


def _prose(source: random.Random, words: list[str], count: int) -> str:
    """Sentences of common words, commas, numbers and a paragraph now and then."""
    sentences: list[str] = []
    while count > 0:
        length = min(count, source.randint(5, 18))
        count -= length
        sentence = [source.choice(words) for _ in range(length)]
        if source.random() < 0.3:
            sentence[length // 2] += ","
        if source.random() < 0.15:
            sentence.append(str(source.randint(2, 9999)))
        text = " ".join(sentence)
        sentences.append(text[0].upper() + text[1:] + source.choice(".....?!:"))
        if source.random() < 0.1:
            sentences.append("\n\n")
    return " ".join(sentences)


def turns(seed: int) -> list[ChatPrompt]:
    """The conversation as the requests of its ten turns: each has the earlier ones before it."""
    source = random.Random(seed)
    words = COMMON_WORDS.split()
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": _prose(source, words, _SYSTEM_WORDS)}
    ]
    prompts = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": _prose(source, words, _QUESTION_WORDS)})
        prompts.append(ChatPrompt(messages=list(messages)))
        if turn < TURNS - 1:
            answer = _prose(source, words, _ANSWER_WORDS)
            messages.append({"role": "assistant", "content": answer})
    return prompts
