"""Reconciling: from what is wanted and what is observed to the writes that bring them together.

`observed` is the frozen input that everything pure works on. What is decided is in `planning`,
which puts together `replicas`, `revisions`, `rollout` and `restart`; none of these does I/O or
reads a clock. `apply` makes the writes, `queue` says when a graph is due.
"""
