"""Where the model's files lie on this machine, and which of them a picker may have.

A picker must tokenize exactly as the engine does, so the pod itself hands out its tokenizer: no
second download, no other revision, no shared volume. Nothing here uses the network; a model that
the engine fetched lies in Hugging Face's cache by the time it is looked up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# What tokenizing and rendering a chat needs, and nothing else of the model's folder.
SERVED_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates/*.jinja"  # a model may bring one for tools, say


def hub_cache(env: Mapping[str, str]) -> Path:
    """Hugging Face's cache folder, found as huggingface_hub finds it."""
    if cache := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache)
    if home := env.get("HF_HOME"):
        return Path(home) / "hub"
    if xdg := env.get("XDG_CACHE_HOME"):
        return Path(xdg) / "huggingface" / "hub"
    home = env.get("HOME") or str(Path("~").expanduser())
    return Path(home) / ".cache" / "huggingface" / "hub"


def find_model(
    model: str, revision: str = "", *, env: Mapping[str, str] | None = None, cache: str = ""
) -> Path | None:
    """The folder of ``model``: a local path, or its snapshot in Hugging Face's cache.

    ``revision`` is a branch, tag or commit (empty: ``main``); ``cache`` overrides the cache folder.
    The cache's layout: ``models--<org>--<name>/{refs/<revision> → commit, snapshots/<commit>/}``.
    """
    path = Path(model)
    if path.is_dir():
        return path
    root = Path(cache) if cache else hub_cache(os.environ if env is None else env)
    repository = root / f"models--{model.replace('/', '--')}"
    revision = revision or "main"
    ref = repository / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = repository / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


@dataclass(frozen=True, slots=True)
class ServedFiles:
    """Files to hand out: name → (path or content, sha256), or why there are none."""

    paths: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)  # content that is no file
    digests: dict[str, str] = field(default_factory=dict)  # name -> sha256, of both
    reason: str = ""  # why ``digests`` is empty


def collect(folder: Path | None, *, chat_template: str = "", missing: str = "") -> ServedFiles:
    """Hash what may be served of ``folder``. Reads every such file: call it in a thread.

    ``chat_template``, a path or the template itself, takes the place of the model's own.
    ``missing`` is the reason to give when there is no folder.
    """
    if folder is None:
        return ServedFiles(reason=missing or "the model's folder was not found")
    paths = {name: folder / name for name in SERVED_NAMES if (folder / name).is_file()}
    paths |= {str(path.relative_to(folder)): path for path in folder.glob(MORE_TEMPLATES)}
    texts: dict[str, bytes] = {}
    if chat_template:
        paths.pop(CHAT_TEMPLATE, None)
        if "\n" not in chat_template and Path(chat_template).is_file():
            paths[CHAT_TEMPLATE] = Path(chat_template)
        else:
            texts[CHAT_TEMPLATE] = chat_template.encode()
    if "tokenizer.json" not in paths:
        return ServedFiles(reason=f"{folder} has no tokenizer.json")
    digests = {name: _sha256(path) for name, path in paths.items()}
    digests |= {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    return ServedFiles(paths, texts, digests)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
