"""What a block's content depends on besides its tokens, as bytes for its key.

A picker knows it from the request, a worker from its engine's events. Both must come to the same
bytes, so both go through this module. An adapter (LoRA) is not among them: it selects the seed of
the whole chain (`keys.model_seed`).

Canonical form of one block: msgpack of the list of its entries in vLLM's order: an
`[identifier, offset]` pair per multimodal item that begins in or reaches into the block (offset of
its first token from the block's first, negative if it began before), the cache salt (first block
only), digests of prompt embeddings. b"" without entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

_encoder = msgspec.msgpack.Encoder()

_TAGS = {"lora", "mm", "cache_salt", "prompt_embeds"}


def block_extras(
    cache_salt: str | None = None,
    multimodal: Sequence[Sequence[tuple[str, int]]] = (),
) -> list[bytes]:
    """A request's extras, for `block_keys(extras=…)`; blocks after the last entry have none.

    multimodal: for each block its (identifier, offset) pairs, in order of position.
    """
    if not cache_salt and not multimodal:
        return []
    per_block: list[list[object]] = [[list(item) for item in items] for items in multimodal]
    if cache_salt:
        per_block = per_block or [[]]
        per_block[0].append(cache_salt)
    return [_encode(entries) for entries in per_block]


def engine_extras(entries: Sequence[object] | None, lora: str | None) -> bytes:
    """Extras of one block as an engine reported them (`extra_keys[i]` of vLLM's BlockStored).

    entries: plain (`"tenant-a"`, `["image-id", 3]`) or tagged (`["cache_salt", "tenant-a"]`,
      `["mm", "image-id", 3]`, `["lora", name, path]`); what is of neither form enters as it is.
    lora: the event's adapter name; its entry, always the first, is left out.
    """
    if not entries:
        return b""
    kept: list[object] = []
    for position, entry in enumerate(entries):
        if isinstance(entry, list | tuple) and entry and entry[0] in _TAGS:
            tag = entry[0]
            if tag == "lora":
                continue
            if tag == "mm" and len(entry) > 2:
                kept.append(list(entry[1:]))
                continue
            if tag != "mm" and len(entry) == 2 and not isinstance(entry[1], int):
                kept.append(entry[1])
                continue
        elif position == 0 and lora and entry == lora:
            continue
        kept.append(entry)
    return _encode(kept)


def _encode(entries: list[object]) -> bytes:
    return _encoder.encode(entries) if entries else b""
