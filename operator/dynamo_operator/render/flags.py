"""Flags of Dynamo's own programs, as tables: what becomes of each where our program runs instead.

A worker's flags are those of vLLM plus a few that only Dynamo's wrapper understood; the engine
would refuse them. They are renamed where the engine has the same thing, read where they say
something that the platform must know (the role of a worker), and otherwise dropped. Flags in no
table reach the program untouched. Names, arity and meaning: Dynamo 1.6.1.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from dynamo_operator.render.shell import Word, quoted


class Action(Enum):
    DROP = "drop"
    DROP_VALUE = "drop with this value"
    RENAME = "rename"
    ROLE = "role"
    PREFILL = "prefill"
    DECODE = "decode"
    TOOL_PARSER = "tool parser"
    REASONING_PARSER = "reasoning parser"


@dataclass(frozen=True, slots=True)
class Rule:
    action: Action
    takes_value: bool = True
    to: str = ""


def _drop(names: str, *, takes_value: bool) -> dict[str, Rule]:
    return {name: Rule(Action.DROP, takes_value) for name in names.split()}


_PLANES = _drop(
    "--namespace --endpoint --discovery-backend --request-plane --response-plane --event-plane",
    takes_value=True,
)

VLLM: Mapping[str, Rule] = {
    **_PLANES,
    **_drop(
        "--endpoint-types --engine-request-limit --fpm-trace --health-check-payload"
        " --multimodal-embedding-cache-capacity-gb --output-modalities --connector"
        " --dyn-default-thinking-mode --dyn-structural-tag --embedding-worker-processes"
        " --custom-encoder-class --embedding-transfer-mode --benchmark-mode",
        takes_value=True,
    ),
    **_drop(
        "--enable-multimodal --route-to-encoder --use-vllm-tokenizer --embedding-worker"
        " --classify-worker --realtime --gms-shadow-mode --multimodal-worker"
        " --multimodal-decode-worker --multimodal-encode-worker --multimodal-processor"
        " --enable-local-indexer --durable-kv-events",
        takes_value=False,
    ),
    "--disaggregation-mode": Rule(Action.ROLE),
    "--is-prefill-worker": Rule(Action.PREFILL, takes_value=False),
    "--is-decode-worker": Rule(Action.DECODE, takes_value=False),
    # Weights that another process holds: the engine loads its own.
    "--load-format": Rule(Action.DROP_VALUE, to="gms"),
    "--custom-jinja-template": Rule(Action.RENAME, to="--chat-template"),
    "--dyn-tool-call-parser": Rule(Action.TOOL_PARSER, to="--tool-call-parser"),
    "--dyn-reasoning-parser": Rule(Action.REASONING_PARSER, to="--reasoning-parser"),
}

MOCKER: Mapping[str, Rule] = {
    **_PLANES,
    **_drop(
        "--engine-type --decode-speedup-ratio --startup-time --data-parallel-size --num-workers"
        " --planner-profile-data --ais-perf-model --kv-transfer-bandwidth --zmq-kv-events-ports"
        " --zmq-replay-ports --bootstrap-ports --preemption-mode --reasoning --num-host-blocks"
        " --extra-engine-args --endpoint-types --dyn-tool-call-parser --dyn-reasoning-parser",
        takes_value=True,
    ),
    **_drop(
        "--enable-prefix-caching --no-enable-prefix-caching --enable-chunked-prefill"
        " --no-enable-chunked-prefill --enable-local-indexer --durable-kv-events",
        takes_value=False,
    ),
    "--disaggregation-mode": Rule(Action.ROLE),
    "--is-prefill-worker": Rule(Action.PREFILL, takes_value=False),
    "--is-decode-worker": Rule(Action.DECODE, takes_value=False),
    "--model-path": Rule(Action.RENAME, to="--model"),
    "--model-name": Rule(Action.RENAME, to="--served-model-name"),
    "--speedup-ratio": Rule(Action.RENAME, to="--speed"),
}

FRONTEND: Mapping[str, Rule] = {
    **_PLANES,
    **_drop(
        "--namespace-prefix --migration-limit --migration-max-seq-len --metrics-prefix"
        " --grpc-metrics-port --reasoning-field-name --dyn-chat-processor"
        " --dyn-preprocess-workers --tokenizer --frontend-route-extension --dump-config-to"
        " --tool-call-parser --reasoning-parser --model-name --model-path"
        " --tcp-tls-cert-path --tcp-tls-key-path --tcp-tls-ca-cert-path",
        takes_value=True,
    ),
    **_drop(
        "--trust-remote-code --kserve-grpc-server --enable-anthropic-api"
        " --strip-anthropic-preamble --no-strip-anthropic-preamble"
        " --enable-streaming-tool-dispatch --enable-streaming-reasoning-dispatch"
        " --exclude-tools-when-tool-choice-none --interactive -i --router-replica-sync"
        " --no-router-replica-sync --serve-indexer --use-remote-indexer",
        takes_value=False,
    ),
    "--no-kv-events": Rule(Action.RENAME, takes_value=False, to="--no-router-kv-events"),
    "--kv-events": Rule(Action.RENAME, takes_value=False, to="--router-kv-events"),
}

ROLES = {"prefill": "prefill", "decode": "decode", "agg": "worker", "pd": "worker"}
"""`--disaggregation-mode` → role."""

_SAME_TOOL_PARSERS = (
    "deepseek_v3 deepseek_v4 gemma4 glm45 glm47 granite hermes inkling jamba kimi_k2 kimi_k3"
    " llama3_json minimax_m2 minimax_m3 mistral pythonic qwen3_coder"
)
TOOL_PARSERS: Mapping[str, str] = {name: name for name in _SAME_TOOL_PARSERS.split()} | {
    "deepseek_v3_1": "deepseek_v31",
    "deepseek_v3_2": "deepseek_v32",
    "harmony": "openai",
    "kimi_k25": "kimi_k2",
    "nemotron_nano": "qwen3_coder",
    "phi4": "phi4_mini_json",
}
"""Dynamo's name of a tool-call format → vLLM's."""

_SAME_REASONING_PARSERS = (
    "deepseek_r1 deepseek_v3 deepseek_v4 gemma4 glm45 glm47 granite inkling kimi_k2 kimi_k3"
    " minimax_m2 minimax_m3 mistral nemotron_v3 qwen3 step3"
)
REASONING_PARSERS: Mapping[str, str] = {name: name for name in _SAME_REASONING_PARSERS.split()} | {
    "gpt_oss": "openai_gptoss",
    "kimi_k25": "kimi_k2",
    "nemotron3": "nemotron_v3",
    "nemotron_nano": "nemotron_v3",
}
"""Dynamo's name of a reasoning format → vLLM's."""


@dataclass(slots=True)
class Translation:
    """The words that our program gets, and what was found on the way."""

    words: list[Word] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    role: str | None = None
    """"worker", "prefill" or "decode", where the flags say it."""
    unknown_mode: str | None = None
    """A `--disaggregation-mode` that no role stands for (an encoder, or a variable)."""

    @property
    def changes(self) -> str:
        """What was changed, as text; "" if nothing was."""
        parts = [f"{old} → {new}" for old, new in self.renamed]
        if self.dropped:
            parts.append(f"dropped {', '.join(self.dropped)}")
        return "; ".join(parts)


def translate(words: Iterable[Word], rules: Mapping[str, Rule]) -> Translation:
    """Apply `rules` to a command line. Underscores in flags count as hyphens, as for argparse
    in vLLM; `--flag=value` and `--flag value` are the same."""
    result = Translation()
    given = list(words)
    found = [_name(word) for word in given]
    names = set(found)
    position = 0
    while position < len(given):
        word, name = given[position], found[position]
        position += 1
        rule = rules.get(name)
        if rule is None:
            result.words.append(word)
            continue
        value: Word | None = None
        inline = rule.takes_value and "=" in word.raw
        if inline:
            value = _inline_value(word)
        elif rule.takes_value and position < len(given):
            value = given[position]
            position += 1
        match rule.action:
            case Action.DROP:
                result.dropped.append(name)
            case Action.DROP_VALUE:
                if value is not None and value.value == rule.to:
                    result.dropped.append(f"{name} {rule.to}")
                    continue
                result.words.append(word)
                if value is not None and not inline:
                    result.words.append(value)
            case Action.RENAME:
                result.renamed.append((name, rule.to))
                if inline and value is not None:
                    text = None if value.value is None else f"{rule.to}={value.value}"
                    result.words.append(Word(f"{rule.to}={value.raw}", text))
                else:
                    result.words.append(Word(rule.to, rule.to))
                    if value is not None:
                        result.words.append(value)
            case Action.PREFILL | Action.DECODE:
                result.role = rule.action.value
                result.dropped.append(name)
            case Action.ROLE:
                mode = value.value if value is not None else None
                if mode in ROLES:
                    result.role = ROLES[mode]
                else:
                    result.unknown_mode = value.raw if value is not None else ""
                result.dropped.append(name)
            case Action.TOOL_PARSER | Action.REASONING_PARSER:
                tools = rule.action is Action.TOOL_PARSER
                known = TOOL_PARSERS if tools else REASONING_PARSERS
                parser = known.get(value.value) if value is not None and value.value else None
                if parser is None or rule.to in names:
                    result.dropped.append(name if value is None else f"{name} {value.raw}")
                    continue
                result.renamed.append(
                    (f"{name} {value.raw if value else ''}", f"{rule.to} {parser}")
                )
                if tools and "--enable-auto-tool-choice" not in names:
                    result.words.append(quoted("--enable-auto-tool-choice"))
                result.words += [quoted(rule.to), quoted(parser)]
    return result


def _inline_value(word: Word) -> Word:
    """The value of a `--flag=value` word, quoted as a shell needs it where the word was quoted."""
    if word.value is not None:
        value = word.value.partition("=")[2]
        return Word(value, value) if word.raw == word.value else quoted(value)
    tail = word.raw.partition("=")[2]
    return Word(f'"{tail}' if word.raw.startswith('"') else tail, None)


def _name(word: Word) -> str:
    """The flag that a word names, without its value; "" if it is none."""
    if word.raw[:1] not in ("-", "'", '"'):
        return ""
    head = word.raw.partition("=")[0].strip("'\"")
    return head.replace("_", "-") if head.startswith("-") else ""
