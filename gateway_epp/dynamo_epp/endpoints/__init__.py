"""The engines as the picker sees them: what the registry says, what they say of themselves.

`worker` is the state of one engine, `pool` keeps it in step with the endpoint snapshots and owns
the prefix index, `streams` follows our own workers, `stock` follows engines without our launcher,
`inbox` takes the cache events that some of those send by themselves. `pulse` asks one that says
nothing whether it lives; `breaker` and `circuits` keep requests from those that fail or are silent.
"""
