"""`python -m dynamo_workers.sim`: the simulated engine as a server."""

import sys

from dynamo_workers.sim.server import main

sys.exit(main())
