"""`make bench`: every benchmark, one after the other; each prints a table and writes its page."""

import subprocess
import sys

BENCHMARKS = (
    "kv_index",
    "tokenize",
    "epp",
    "epp.behind_gateway",
    "routing",
    "replicas",
    "overload",
)


def main() -> int:
    failed = [
        name
        for name in BENCHMARKS
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
