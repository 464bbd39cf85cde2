"""Reconciling: from what is wanted and what is observed to the writes that bring them together.

`observed` is the frozen input that everything pure works on; what is decided is in `plan`, `replicas`,
`rollout`, `revisions` and `restart`, none of which does I/O; `apply` makes the writes and `controller`
decides when a graph is due.
"""
