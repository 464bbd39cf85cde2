"""Runs the tests of the rooms that changed since they last passed, as a build system would.

A room's tests depend on the room, on the rooms it may import, on its tests and on what is
installed. A digest over all that is kept when they pass; a room whose digest is the same is not
tested again, and is named. `--all` tests everything; arguments for pytest do too, since then it is
not known what a pass means. A fresh clone has no digests: there everything runs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED = ROOT / ".pytest_cache" / "rooms.json"

# Room -> the rooms it may import, all the way down; import-linter holds the code to it.
ROOMS: dict[str, tuple[str, ...]] = {
    "runtime": (),
    "crds": (),
    "kv_router": ("runtime",),
    "operator": ("crds", "runtime"),
    "gateway_epp": ("kv_router", "runtime", "crds", "workers"),  # its tests use the tiny tokenizer
    "workers": ("kv_router", "runtime", "crds"),
    "images": ("crds", "e2e/cluster", "operator", "runtime", "requirements"),
    "cli": ("crds", "gateway_epp", "kv_router", "operator", "runtime", "workers", "examples"),
}
ALWAYS = ("conftest.py", "pyproject.toml", "requirements/dev.txt", ".importlinter")


def files(names: Iterable[str]) -> Iterator[Path]:
    """The files that git knows or would add under ``names``."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *names]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in sorted(set(listed.splitlines())):
        if (ROOT / name).is_file():
            yield ROOT / name


def digest(room: str) -> str:
    """Over everything that the room's tests depend on."""
    total = hashlib.sha256(f"{sys.version} CORPORA={os.environ.get('CORPORA')}".encode())
    for path in files((room, *ROOMS[room], f"tests/{room}", *ALWAYS)):
        total.update(f"\0{path.relative_to(ROOT)}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="test every room")
    options, arguments = parser.parse_known_args()
    digests = {room: digest(room) for room in ROOMS}
    try:
        passed = json.loads(PASSED.read_text())
    except (OSError, ValueError):
        passed = {}
    everything = options.all or bool(arguments)
    due = [room for room in ROOMS if everything or passed.get(room) != digests[room]]
    if unchanged := [room for room in ROOMS if room not in due]:
        print(f"unchanged since they passed: {', '.join(unchanged)} (ALL=1 tests them again)")
    if not due:
        return 0
    command = [sys.executable, "-m", "pytest", *(f"tests/{room}" for room in due), "-n", "2"]
    status = subprocess.run([*command, *arguments], cwd=ROOT, check=False).returncode
    if status == 0 and not arguments:
        PASSED.parent.mkdir(exist_ok=True)
        PASSED.write_text(json.dumps({**passed, **{room: digests[room] for room in due}}))
    return status


if __name__ == "__main__":
    sys.exit(main())
