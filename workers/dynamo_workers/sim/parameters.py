"""Reads the parameters of a generation request; says which one is wrong, as vLLM does.

What cannot be simulated truthfully (log probabilities, constrained output) is refused rather than
ignored: an answer that silently lacks what was asked for would be taken for a bug elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_workers.sim.errors import RequestError

NOT_SIMULATED = (
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "structured_outputs",
    "use_beam_search",
    "suffix",
    "prompt_embeds",
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a request says about its answers. `max_tokens` None: as many as fit."""

    max_tokens: int | None
    min_tokens: int
    n: int
    ignore_eos: bool
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    salt: str | None


def read(
    body: Mapping[str, Any], *, limits: tuple[str, ...], default_max_tokens: int | None
) -> Parameters:
    """`limits` are the names that the number of tokens goes by here, the stronger one first."""
    for name in NOT_SIMULATED:
        if body.get(name) not in (None, False, 0):
            raise RequestError(f"The simulated engine does not support {name}.", param=name)
    kind = body.get("response_format")
    if kind is not None and (not isinstance(kind, dict) or kind.get("type") != "text"):
        raise RequestError(
            "The simulated engine writes free text only.", param="response_format", value=kind
        )
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise RequestError(
            "The simulated engine calls no tools.", param="tool_choice", value=choice
        )
    temperature = number(body, "temperature")
    if temperature is not None and temperature < 0:
        raise RequestError(
            f"temperature must be non-negative, got {temperature}.",
            param="temperature",
            value=temperature,
        )
    max_tokens = default_max_tokens
    for name in reversed(limits):
        given = integer(body, name)
        if given is not None:
            if given < 1:
                raise RequestError(
                    f"{name} must be at least 1, got {given}.", param=name, value=given
                )
            max_tokens = given
    n = integer(body, "n")
    if n is not None and not 1 <= n <= 128:
        raise RequestError(f"n must be from 1 to 128, got {n}.", param="n", value=n)
    stream = boolean(body, "stream")
    options = body.get("stream_options")
    if options is not None and not stream:
        raise RequestError(
            "Stream options can only be defined when `stream=True`.", param="stream_options"
        )
    if options is not None and not isinstance(options, dict):
        raise RequestError("stream_options must be an object.", param="stream_options")
    include_usage = boolean(options or {}, "include_usage")
    salt = body.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError(
            "Parameter 'cache_salt' must be a non-empty string if provided.", param="cache_salt"
        )
    return Parameters(
        max_tokens=max_tokens,
        min_tokens=integer(body, "min_tokens") or 0,
        n=1 if n is None else n,
        ignore_eos=boolean(body, "ignore_eos"),
        stop=_stop_strings(body),
        stop_token_ids=_token_ids(body, "stop_token_ids"),
        include_stop=boolean(body, "include_stop_str_in_output"),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=include_usage and boolean(options or {}, "continuous_usage_stats"),
        return_token_ids=boolean(body, "return_token_ids"),
        salt=salt,
    )


def integer(body: Mapping[str, Any], name: str) -> int | None:
    """A whole number or None."""
    value = body.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise RequestError(f"{name} must be an integer.", param=name, value=value)
    return value


def number(body: Mapping[str, Any], name: str) -> float | None:
    """A number or None."""
    value = body.get(name)
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise RequestError(f"{name} must be a number.", param=name, value=value)
    return value


def boolean(body: Mapping[str, Any], name: str) -> bool:
    """True or False; absent and null are False."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false.", param=name, value=value)
    return value is True


def _stop_strings(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    if value is None:
        return ()
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise RequestError("stop must be a string or a list of strings.", param="stop")
    if "" in words:
        raise RequestError("stop cannot contain an empty string.", param="stop")
    return tuple(words)


def _token_ids(body: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = body.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise RequestError(f"{name} must be a list of token ids.", param=name)
    return tuple(value)
