"""The engines a worker can run. Each is a program with an OpenAI server that reads vLLM's flags."""

from dynamo_workers.engines.arguments import Arguments, BadArguments
from dynamo_workers.engines.base import Description, Engine, Models, Place
from dynamo_workers.engines.sim import SimEngine
from dynamo_workers.engines.vllm import VllmEngine

__all__ = [
    "Arguments",
    "BadArguments",
    "Description",
    "Engine",
    "Models",
    "Place",
    "SimEngine",
    "VllmEngine",
]
