"""Getting a model's tokenizer from the workers that serve it, once for each content.

Workers hand out files with their hashes. All workers of a model have the same ones, so the hashes,
not the worker, name a tokenizer: the hundredth pod of a model costs nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

import aiohttp
import msgspec

from dynamo_epp.tokenize.exact import NotExact
from dynamo_epp.tokenize.runner import LocalTokenizer, TokenizeThreads
from dynamo_epp.tokenize.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LARGEST_FILE = 128 << 20
"""Bytes; the largest known tokenizer.json has 35 million."""

# Served beside the tokenizer, but without a say in tokens.
_IRRELEVANT = frozenset(("generation_config.json",))


def fingerprint(files: Mapping[str, str], settings: Mapping[str, str]) -> str:
    """The name of a tokenizer: a hash over its files' hashes and the settings it is used with."""
    relevant = {name: digest for name, digest in files.items() if name not in _IRRELEVANT}
    content = msgspec.json.encode([sorted(relevant.items()), sorted(settings.items())])
    return hashlib.sha256(content).hexdigest()[:32]


class TokenizerSource:
    """Loads tokenizers over HTTP and keeps them by content.

    ``folder``, if given, keeps files across restarts, named by their hash. ``session`` and
    ``threads`` belong to the caller.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        threads: TokenizeThreads,
        *,
        folder: Path | None = None,
        timeout_s: float = 30.0,
        deadline_s: float = 2.0,
    ) -> None:
        self._session = session
        self._threads = threads
        self._folder = folder
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._deadline = deadline_s
        self._loaded: dict[str, LocalTokenizer] = {}
        self._loading: dict[str, asyncio.Task[LocalTokenizer]] = {}
        self.loads = 0
        """Tokenizers built so far."""

    def get(self, name: str) -> LocalTokenizer | None:
        """The tokenizer with this fingerprint, if it is loaded."""
        return self._loaded.get(name)

    async def load(
        self, base_url: str, files: Mapping[str, str], settings: Mapping[str, str]
    ) -> LocalTokenizer:
        """The tokenizer of these files (name → sha256), fetched from ``base_url``/tokenizer/<name>.

        Calls for the same content share one load. Raises `NotExact` if a file cannot be had, has
        another hash, or gives no exact tokenizer; a later call tries again.
        """
        name = fingerprint(files, settings)
        loaded = self._loaded.get(name)
        if loaded is not None:
            return loaded
        task = self._loading.get(name)
        if task is None:
            task = asyncio.create_task(self._load(name, base_url, dict(files), dict(settings)))
            self._loading[name] = task
            task.add_done_callback(lambda done: self._finished(name, done))
        return await asyncio.shield(task)

    def _finished(self, name: str, task: asyncio.Task[LocalTokenizer]) -> None:
        self._loading.pop(name, None)
        if not task.cancelled():
            task.exception()  # seen: every caller may have been cancelled

    def retain(self, names: set[str]) -> None:
        """Drop tokenizers that no worker needs any more."""
        for name in self._loaded.keys() - names:
            del self._loaded[name]

    async def _load(
        self, name: str, base_url: str, files: dict[str, str], settings: dict[str, str]
    ) -> LocalTokenizer:
        relevant = sorted(files.keys() - _IRRELEVANT)
        contents = await asyncio.gather(
            *(self._file(base_url, file, files[file]) for file in relevant)
        )
        given = dict(zip(relevant, contents, strict=True))
        tokenizer = await self._build(lambda: Tokenizer.from_files(given, settings))
        self.loads += 1
        local = LocalTokenizer(tokenizer, self._threads, deadline_s=self._deadline)
        self._loaded[name] = local
        logger.info("tokenizer %s loaded from %s; %s", name, base_url, tokenizer.segmentation)
        return local

    @staticmethod
    async def _build(build: Callable[[], Tokenizer]) -> Tokenizer:
        # Half a second for a large vocabulary, in which the library does not release Python's lock.
        # A thread of its own at least keeps the files' hashing and checking beside the loop.
        return await asyncio.to_thread(build)

    async def _file(self, base_url: str, name: str, digest: str) -> bytes:
        kept = self._kept(digest)
        if kept is not None:
            content = await asyncio.to_thread(_read, kept)
            if content is not None and await asyncio.to_thread(_sha256, content) == digest:
                return content
        url = f"{base_url.rstrip('/')}/tokenizer/{quote(name)}"
        content = await self._fetch(url)
        found = await asyncio.to_thread(_sha256, content)
        if found != digest:
            raise NotExact(f"{url} has sha256 {found}, the worker announced {digest}")
        if kept is not None:
            await asyncio.to_thread(_write, kept, content)
        return content

    def _kept(self, digest: str) -> Path | None:
        plain = len(digest) == 64 and digest.isalnum()  # a path must not come from the network
        return self._folder / digest if self._folder is not None and plain else None

    async def _fetch(self, url: str) -> bytes:
        try:
            async with self._session.get(url, timeout=self._timeout) as response:
                if response.status != 200:
                    raise NotExact(f"{url} answered {response.status}")
                content = bytearray()
                async for chunk in response.content.iter_chunked(1 << 20):
                    content += chunk
                    if len(content) > LARGEST_FILE:
                        raise NotExact(f"{url} is larger than {LARGEST_FILE} bytes")
                return bytes(content)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise NotExact(f"{url} cannot be fetched: {error or type(error).__name__}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write(path: Path, content: bytes) -> None:
    """Atomic; a cache that cannot be written is no reason to fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        logger.warning("tokenizer file not kept: %s", error)
