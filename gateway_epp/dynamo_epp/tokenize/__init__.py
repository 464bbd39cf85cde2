"""Exact prompt tokens, or the reason why there are none."""

from typing import Protocol

from dynamo_epp.requests import Prompt
from dynamo_epp.tokenize.exact import Exactness, NotExact, TooCostly, Trust
from dynamo_epp.tokenize.remote import RemoteTokenizer
from dynamo_epp.tokenize.runner import LocalTokenizer, TokenizeThreads
from dynamo_epp.tokenize.segments import SegmentCache, Tokens, proves_segmentation
from dynamo_epp.tokenize.source import TokenizerSource, fingerprint
from dynamo_epp.tokenize.tokenizer import Tokenizer, tokenize_ids


class PromptTokenizer(Protocol):
    """What the picker asks for tokens: `LocalTokenizer` or `RemoteTokenizer`."""

    async def tokenize(self, prompt: Prompt) -> list[Tokens]:
        """Tokens of each prompt, uint32. Raises `NotExact`."""
        ...


__all__ = [
    "Exactness",
    "LocalTokenizer",
    "NotExact",
    "PromptTokenizer",
    "RemoteTokenizer",
    "SegmentCache",
    "TokenizeThreads",
    "Tokenizer",
    "TokenizerSource",
    "Tokens",
    "TooCostly",
    "Trust",
    "fingerprint",
    "proves_segmentation",
    "tokenize_ids",
]
