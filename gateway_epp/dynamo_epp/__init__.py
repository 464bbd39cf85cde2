"""The endpoint picker.

gRPC takes part in every fork by default: it closes and opens its epoll descriptors around it, in
the parent too, and other threads then wait on, or close, numbers that somebody else has got by now
(libzmq aborts on that). Here a fork is only ever followed by exec, so gRPC has nothing to do there;
it reads this when it is loaded. Source: gRPC's doc/fork_support.md.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
