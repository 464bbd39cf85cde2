"""A simulated engine that behaves like vLLM from outside: `python -m dynamo_workers.sim`.

It computes nothing, but it has everything else that a router sees of an engine: the OpenAI API
with streaming and usage, paged KV blocks with prefix caching, the KV events, the metrics, and
times that follow a profile. So the whole platform runs, and can be measured, without a GPU.
"""
