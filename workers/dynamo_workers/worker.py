"""A worker pod's process: from a command line and an environment to an exit status."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from dynamo_runtime import lifecycle, logs

from dynamo_workers.engines import BadArguments, Engine, SimEngine, VllmEngine
from dynamo_workers.launcher import run_launcher
from dynamo_workers.settings import Settings

log = logging.getLogger(__name__)

KINDS: dict[str, Callable[[Sequence[str], Mapping[str, str], int], Engine]] = {
    "sim": SimEngine,
    "vllm": VllmEngine,
}


def run_worker(kind: str, arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a worker of ``kind`` (``sim`` or ``vllm``) until it ends; return its exit status.

    2 is for what can't work as it was given. Otherwise: see ``run_launcher``.
    """
    try:
        logs.configure(f"worker-{kind}", env.get("DYN_LOG_LEVEL") or "INFO")
        settings = Settings.from_env(env)
        engine = KINDS[kind](arguments, env, settings.http_port)
    except (BadArguments, ValueError) as error:
        log.error("%s", error)
        return 2
    return lifecycle.run(lambda life: run_launcher(engine, settings, life, adopt_orphans=True))


if __name__ == "__main__":
    sys.exit(run_worker(sys.argv[1], sys.argv[2:], os.environ))
