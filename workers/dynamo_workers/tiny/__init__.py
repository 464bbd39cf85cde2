"""The tiny model: a bundled tokenizer with a chat template, and a random Llama around it.

It lets everything run with nothing downloaded: the simulated engine uses the tokenizer, a real
engine loads the folder that `write_model` makes, and both give the same tokens for the same chat.
"""

from dynamo_workers.tiny.adapter import write_adapter
from dynamo_workers.tiny.files import FOLDER as TOKENIZER_FOLDER
from dynamo_workers.tiny.files import SPECIAL_TOKENS, TOKENIZER_FILES
from dynamo_workers.tiny.model import is_tiny_model, write_model

__all__ = [
    "SPECIAL_TOKENS",
    "TOKENIZER_FILES",
    "TOKENIZER_FOLDER",
    "is_tiny_model",
    "write_adapter",
    "write_model",
]
