"""The mark of a namespace that has an operator of its own.

A restricted operator keeps this Lease in each of its namespaces. It tells a cluster-wide one, its
webhook included, to leave the namespace alone. Name and times are Dynamo's.
"""

MARKER = "dynamo-operator-namespace-scope"
DURATION_S = 30.0
"""Not renewed for so long, it binds nobody any more."""
RENEW_S = 10.0
