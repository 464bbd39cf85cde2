"""Names of the bundled files and of their special tokens."""

from pathlib import Path

FOLDER = Path(__file__).parent

BOS = "<|bos|>"
EOS = "<|eos|>"
END = "<|end|>"
SPECIAL_TOKENS = (
    BOS,
    EOS,
    END,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|call|>",
)
"""In the order of their ids, from 0. <|end|> closes a turn and is what ends a generation."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What makes up the tokenizer: vocabulary and rules; special tokens and chat template."""
