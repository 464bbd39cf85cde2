"""`dynamo chat`: talk to an endpoint, in a conversation or with one message."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import typer


class ChatFailed(Exception):
    """The endpoint can't be reached or refused; the message says which and why."""


def chat(
    message: Annotated[
        str | None, typer.Argument(help="One message; without it a conversation starts.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            envvar="DYNAMO_URL",
            help="The endpoint, such as http://127.0.0.1:8000. Found by itself for `dynamo up`.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model name; without it the endpoint's only or first one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Chat with a model; the answer is streamed.

    Examples:

      dynamo chat "Why is the sky blue?"

      dynamo chat --url http://10.0.0.7:8000 --model llama

      echo "Summarise this" | dynamo chat
    """
    endpoint = Endpoint((url or _running_url()).rstrip("/"), model or "", max_tokens)
    messages = [{"role": "system", "content": system}] if system else []
    try:
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.read().strip()
            if not message:
                raise ChatFailed("standard input is empty; give a message")
        if message is None:
            _converse(endpoint, messages)
        else:
            messages.append({"role": "user", "content": message})
            asyncio.run(endpoint.say(messages, []))
    except ChatFailed as error:
        _complain(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(128 + signal.SIGINT) from None


def _complain(error: ChatFailed) -> None:
    sys.stderr.write(f"dynamo chat: {error}\n")


def _converse(endpoint: Endpoint, messages: list[dict[str, str]]) -> None:
    """Read and answer until the user ends it. Input is read outside the event loop: a thread that
    waits for a line would outlast Ctrl-C."""
    asyncio.run(endpoint.choose_model())
    typer.echo(f"{endpoint.model} at {endpoint.url}; an empty line or Ctrl-D ends the conversation")
    while text := _line():
        parts: list[str] = []
        question = {"role": "user", "content": text}
        try:
            asyncio.run(endpoint.say([*messages, question], parts))
        except ChatFailed as error:
            _complain(error)
            continue
        except KeyboardInterrupt:
            typer.echo()  # enough of this answer
        messages += [question, {"role": "assistant", "content": "".join(parts)}]


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        typer.echo()
        return ""


def _running_url() -> str:
    from dynamo_cli.local.record import running_ups

    ups = running_ups()
    if len(ups) == 1 and ups[0].url:
        return ups[0].url
    runs = ", ".join(f"{up.graph} ({up.url or 'no frontend'})" for up in ups)
    found = f"running: {runs}" if ups else "nothing that `dynamo up` runs was found"
    sys.stderr.write(f"dynamo chat: {found}; name the endpoint with --url http://HOST:8000\n")
    raise typer.Exit(1)


class Endpoint:
    """An OpenAI-compatible endpoint and the model to ask there ("": its first one)."""

    def __init__(self, url: str, model: str, max_tokens: int) -> None:
        self.url = url
        self.model = model
        self._max_tokens = max_tokens

    async def choose_model(self) -> None:
        """Take the first model that the endpoint names, unless one was named."""
        if not self.model:
            async with self._session() as session:
                await self._first_model(session)

    async def say(self, messages: list[dict[str, str]], parts: list[str]) -> None:
        """Print the answer to ``messages`` as it comes, and add its pieces to ``parts``."""
        async with self._session() as session:
            if not self.model:
                await self._first_model(session)
            body = {
                "model": self.model,
                "messages": messages,
                "max_tokens": self._max_tokens,
                "stream": True,
            }
            async with session.post(f"{self.url}/v1/chat/completions", json=body) as answer:
                if answer.status != 200:
                    text = await _error_text(answer)
                    raise ChatFailed(f"{self.url} answered {answer.status}: {text}")
                async for part in _deltas(answer.content):
                    parts.append(part)
                    sys.stdout.write(part)
                    sys.stdout.flush()
            typer.echo()

    async def _first_model(self, session: Any) -> None:
        async with session.get(f"{self.url}/v1/models") as answer:
            if answer.status != 200:
                raise ChatFailed(f"{self.url}/v1/models answered {answer.status}")
            models = await _models(answer)
        if not models:
            raise ChatFailed(f"{self.url} serves no model yet")
        self.model = models[0]

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Any]:
        import aiohttp

        # No limit on the whole answer: it may stream for long. Silence is what counts.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session:
                yield session
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise ChatFailed(f"{self.url!r} is no URL such as http://HOST:8000") from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ChatFailed(f"{self.url}: {error or type(error).__name__}") from error


async def _models(answer: Any) -> list[str]:
    import msgspec

    try:
        return [str(model["id"]) for model in msgspec.json.decode(await answer.read())["data"]]
    except (msgspec.DecodeError, LookupError, TypeError):
        raise ChatFailed(f"{answer.url} answered no list of models: is it the endpoint?") from None


async def _error_text(answer: Any) -> str:
    import msgspec

    raw = await answer.read()
    try:
        return str(msgspec.json.decode(raw)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return str(raw[:200].decode(errors="replace"))


async def _deltas(lines: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The text of each server-sent chunk. Raises ``ChatFailed`` for one that carries an error."""
    import msgspec

    finished = False
    async for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            finished = True
            continue
        try:
            chunk = msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.DecodeError:
            raise ChatFailed(f"the answer can't be understood: {data[:200]!r}") from None
        if "error" in chunk:
            raise ChatFailed(f"the answer broke off: {chunk['error'].get('message', chunk)}")
        for choice in chunk.get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                yield text
    if not finished:
        raise ChatFailed("the answer broke off before its end")
