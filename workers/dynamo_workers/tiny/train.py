"""Trains the bundled tokenizer: `python -m dynamo_workers.tiny.train [--check]`.

The result is committed beside this file, so nobody has to run this; it is kept because a
vocabulary that cannot be made again cannot be trusted. Training is deterministic: the same corpus
and the same version of the `tokenizers` library give the same bytes.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dynamo_workers.tiny.corpus import texts
from dynamo_workers.tiny.files import BOS, END, FOLDER, SPECIAL_TOKENS

VOCABULARY_SIZE = 3072


def train() -> Tokenizer:
    """A byte-level BPE of `VOCABULARY_SIZE` ids; the special tokens have the lowest ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[
            AddedToken(token, lstrip=False, rstrip=False, normalized=False, special=True)
            for token in SPECIAL_TOKENS
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    # /v1/completions adds <|bos|> as a model's own tokenizer does; the chat template writes it.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def tokenizer_config(chat_template: str) -> dict[str, object]:
    """tokenizer_config.json in the form that transformers (and so vLLM) reads."""
    return {
        "added_tokens_decoder": {
            str(number): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for number, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (BOS, END)],
        "bos_token": BOS,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": 32768,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def main() -> int:
    """Writes the files, or with --check only compares them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train the tokenizer that is bundled here.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    template = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    config = tokenizer_config(template)
    made: dict[Path, str] = {
        FOLDER / "tokenizer.json": train().to_str(pretty=False) + "\n",
        FOLDER / "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    stale = []
    for path, text in made.items():
        if arguments.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(path.name)
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"differ from what training makes: {', '.join(stale)}\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
