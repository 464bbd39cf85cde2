"""The `dynamo` command.

Linux does not deliver SIGTERM to process 1 before that has a handler. In a container this process
is number 1, and what it imports takes a second or two: a pod that is deleted meanwhile would go on
as if nothing had been said, until its grace period is over. So the handler comes before everything
else; whatever runs then installs its own.
"""

import os
import signal

if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
