"""The simulated engine under the launcher: same flags, events, metrics and middleware as vLLM."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamo_workers.engines.arguments import Arguments, BadArguments
from dynamo_workers.engines.base import Place, Server
from dynamo_workers.tiny import TOKENIZER_FOLDER as BUNDLED

log = logging.getLogger(__name__)


class SimEngine(Server):
    """``python -m dynamo_workers.sim ARGUMENTS`` under the launcher."""

    runtime = "sim"

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], port: int) -> None:
        line = Arguments(arguments)
        translate_mocker_flags(line)
        super().__init__(line, env, port)

    def argv(self, place: Place) -> list[str]:
        return [sys.executable, "-m", "dynamo_workers.sim", *self._server_flags(place)]

    def env(self, place: Place) -> dict[str, str]:
        return self._server_env(place)

    def _folder(self, name: str, revision: str) -> Path | None:
        """Its own tokenizer is the bundled one, unless the model is a folder that has one."""
        folder = Path(name)
        return folder if (folder / "tokenizer.json").is_file() else BUNDLED


def translate_mocker_flags(line: Arguments) -> None:
    """Flags of NVIDIA Dynamo's mocker in this engine's words; a graph written for it should start.

    What has no counterpart and changes only timing is removed with a warning. What would change
    how many workers there are is refused.
    """
    if line.number("--num-workers") > 1:
        raise BadArguments("--num-workers: one pod is one worker; set replicas in the graph")
    line.rename("--model-path", "--model")
    line.rename("--model-name", "--served-model-name")
    line.rename("--speedup-ratio", "--speed")
    for flag, why in (
        ("--num-workers", "one pod is one worker"),
        ("--disaggregation-mode", "the graph's component type decides the role"),
        ("--engine-type", "the engine behaves as vLLM does"),
        ("--planner-profile-data", "use --timing-profile"),
        ("--ais-perf-model", "use --timing-profile"),
        ("--decode-speedup-ratio", "use --timing-profile"),
        ("--startup-time", "the engine starts as fast as it can"),
        ("--kv-transfer-bandwidth", "transfers take no time"),
        ("--preemption-mode", "the scheduler preempts as vLLM's does"),
        ("--zmq-kv-events-ports", "events leave by the worker's own stream"),
        ("--zmq-replay-ports", "events leave by the worker's own stream"),
        ("--bootstrap-ports", "workers are named by the picker"),
        ("--num-host-blocks", "there is no host tier"),
        ("--request-plane", "requests come over HTTP"),
        ("--event-plane", "events leave by the worker's own stream"),
        ("--discovery-backend", "the pod is found by its endpoint"),
        ("--endpoint", "the pod is found by its endpoint"),
    ):
        if line.has(flag):
            given = " ".join([flag, *line.remove(flag)])
            log.warning("%s is the mocker's own and has no effect: %s", given, why)
