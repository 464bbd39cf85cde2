"""The limit of open files, raised in a process of its own and handed on to what it starts."""

import resource
import subprocess
import sys

PROGRAM = """
import resource, subprocess, sys
from dynamo_runtime import open_files
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
assert open_files.raise_limit() == hard
shown = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
subprocess.run([sys.executable, "-c", shown], check=True)
"""


def test_as_many_files_as_may_be_open_and_children_have_it_too() -> None:
    shown = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert int(shown.stdout) == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
