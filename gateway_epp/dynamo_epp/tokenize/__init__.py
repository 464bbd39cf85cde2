"""Exact prompt tokens, or the reason why there are none."""

from dynamo_epp.tokenize.exact import Exactness, NotExact, Trust
from dynamo_epp.tokenize.segments import SegmentCache, Tokens, proves_segmentation
from dynamo_epp.tokenize.tokenizer import Tokenizer

__all__ = [
    "Exactness",
    "NotExact",
    "SegmentCache",
    "Tokenizer",
    "Tokens",
    "Trust",
    "proves_segmentation",
]
