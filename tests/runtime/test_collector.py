"""The cycle collector leaves alone what was there before the first readiness."""

import subprocess
import sys

PROGRAM = """
import gc
from dynamo_runtime.lifecycle import Lifecycle, run

async def main(lifecycle):
    before = gc.get_freeze_count()
    lifecycle.set_ready()
    frozen, threshold = gc.get_freeze_count(), gc.get_threshold()[0]
    lifecycle.set_not_ready("for a while")
    later = [[] for _ in range(1000)]
    lifecycle.set_ready()
    assert gc.get_freeze_count() <= frozen, "only once"
    print(before, frozen > 1000, threshold)
    return 0

run(main)
"""


def test_what_is_there_at_the_first_readiness_is_not_looked_at_again() -> None:
    shown = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, "0 True 20000\n"), shown.stderr
