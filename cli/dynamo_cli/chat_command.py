"""`dynamo chat`: talk to an endpoint, in a conversation or with one message."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
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
    if url is None:
        url = _running_url()
    try:
        asyncio.run(_chat(url.rstrip("/"), model, system, message, max_tokens))
    except ChatFailed as error:
        sys.stderr.write(f"dynamo chat: {error}\n")
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, EOFError):
        typer.echo()


def _running_url() -> str:
    from dynamo_cli.local.record import running_ups

    ups = running_ups()
    if len(ups) == 1 and ups[0].url:
        return ups[0].url
    found = "nothing that `dynamo up` runs was found" if not ups else f"{len(ups)} graphs run"
    sys.stderr.write(f"dynamo chat: {found}; name the endpoint with --url http://HOST:8000\n")
    raise typer.Exit(1)


async def _chat(
    url: str, model: str | None, system: str | None, message: str | None, max_tokens: int
) -> None:
    import aiohttp

    # No limit on the whole answer: it may stream for long. Silence is what counts.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        try:
            if model is None:
                model = await _first_model(session, url)
            messages: list[dict[str, str]] = []
            if system:
                messages.append({"role": "system", "content": system})
            if message is None and not sys.stdin.isatty():
                message = (await asyncio.to_thread(sys.stdin.read)).strip()
                if not message:
                    raise ChatFailed("standard input is empty; give a message")
            if message is not None:
                messages.append({"role": "user", "content": message})
                await _say(session, url, model, messages, max_tokens)
                return
            typer.echo(f"{model} at {url}; an empty line or Ctrl-D ends the conversation")
            while text := (await asyncio.to_thread(input, "> ")).strip():
                messages.append({"role": "user", "content": text})
                answer = await _say(session, url, model, messages, max_tokens)
                messages.append({"role": "assistant", "content": answer})
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ChatFailed(f"{url}: {error or type(error).__name__}") from error


async def _first_model(session: Any, url: str) -> str:
    async with session.get(f"{url}/v1/models") as answer:
        if answer.status != 200:
            raise ChatFailed(f"{url}/v1/models answered {answer.status}")
        models = (await answer.json())["data"]
    if not models:
        raise ChatFailed(f"{url} serves no model yet")
    return str(models[0]["id"])


async def _say(
    session: Any, url: str, model: str, messages: list[dict[str, str]], max_tokens: int
) -> str:
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
    parts = []
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise ChatFailed(f"{url} answered {answer.status}: {await _error_text(answer)}")
        async for part in _deltas(answer.content):
            parts.append(part)
            sys.stdout.write(part)
            sys.stdout.flush()
    typer.echo()
    return "".join(parts)


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
        chunk = msgspec.json.decode(data)
        if "error" in chunk:
            raise ChatFailed(f"the answer broke off: {chunk['error'].get('message', chunk)}")
        for choice in chunk.get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                yield text
    if not finished:
        raise ChatFailed("the answer broke off before its end")
