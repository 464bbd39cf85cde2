"""Code that runs inside the engine's own process, in the engine's own Python.

Only this folder goes on the engine's ``PYTHONPATH``. What is in it imports nothing from this
project, and this project does not import it: a worker's Python needn't be the engine's.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MIDDLEWARE = "dynamo_engine_middleware.EngineLoad"
PREFILL_MIDDLEWARE = "dynamo_engine_prefill.RemotePrefill"
SOCKET_VARIABLE = "DYN_ENGINE_REPORT_SOCKET"
