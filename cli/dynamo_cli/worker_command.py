"""`dynamo worker sim|vllm ARGS…`: one worker pod's process. Arguments go to the engine untouched.

The code behind it is imported only when a worker is run: a command line that only renders
manifests must not need the engine's libraries.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="ARGS", help="Passed to the engine.")
]


def sim(args: Arguments = None) -> None:
    """Run a worker with the simulated engine: no GPU, no model, the same from outside.

    It takes vLLM's flags. Addresses, names and limits come from the environment, as a pod
    sets them: POD_NAME, DYN_HTTP_HOST, DYN_HTTP_PORT (8000), DYN_SYSTEM_HOST, DYN_SYSTEM_PORT
    (9090), DYN_STREAM_PORT (5557), DYN_READY_WITHOUT_PICKER_SECONDS (60), DYN_DRAIN_SECONDS
    (300), DYN_DRAIN_QUIET_SECONDS (1), DYN_STOP_SECONDS (15), DYN_HUNG_SECONDS (60),
    DYN_LOG_LEVEL (INFO).

    Examples:

      dynamo worker sim --served-model-name tiny

      dynamo worker sim --served-model-name tiny --block-size 32 --speed 4

      DYN_HTTP_HOST=127.0.1.1 DYN_SYSTEM_HOST=127.0.1.1 dynamo worker sim
    """
    _run("sim", args or [])


def vllm(args: Arguments = None) -> None:
    """Run a worker with vLLM's OpenAI server, with every flag it knows.

    The environment is that of `dynamo worker sim`. The engine's Python is DYN_VLLM_PYTHON, or
    this one if vLLM is installed in it, or the one that `make vllm-cpu` made. On CPU
    (DYN_VLLM_CPU=auto|0|1) settings are added that let several engines share few cores; each
    of them gives way to the environment.

    Examples:

      dynamo worker vllm --model Qwen/Qwen3-0.6B --max-model-len 8192

      dynamo worker vllm ./tiny --served-model-name tiny --enforce-eager
    """
    _run("vllm", args or [])


def _run(kind: str, args: list[str]) -> NoReturn:
    from dynamo_workers.worker import run_worker

    sys.exit(run_worker(kind, args, os.environ))
