"""What every process of the platform shares.

Lifecycle and drain, child processes, the status server, logging, discovery of endpoints and the
timing-profile format. This room imports no other room.
"""

__version__ = "0.1.0"
