"""Pins the requirements of each extra, with hashes and without the address of any index.

`requirements.py EXTRA…` writes requirements/EXTRA.txt, keeping the pins that still hold;
`--upgrade` takes the newest; `--check` writes nothing and fails if a file is out of date.
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
UV = Path(sysconfig.get_path("scripts")) / "uv"


def compile_(source: Path, extra: str | None, output: Path, upgrade: bool) -> None:
    """Resolve ``source`` (with ``extra``) into ``output``, whose present pins are preferred."""
    command = [
        str(UV), "pip", "compile", str(source), "--output-file", str(output),
        "--universal", "--python-version", "3.11", "--generate-hashes",
        "--no-emit-index-url", "--no-header", "--no-annotate", "--quiet",
    ]  # fmt: skip
    if extra:
        command += ["--extra", extra]
    if upgrade:
        command.append("--upgrade")
    subprocess.run(command, check=True, cwd=ROOT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="+")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--upgrade", action="store_true")
    options = parser.parse_args()
    sources: list[tuple[Path, str | None, str]] = [
        (FOLDER / "bootstrap.in", None, "bootstrap"),
        *((ROOT / "pyproject.toml", extra, extra) for extra in options.extras),
    ]
    stale = []
    with tempfile.TemporaryDirectory() as scratch:
        for source, extra, name in sources:
            target = FOLDER / f"{name}.txt"
            present = target.read_text() if target.exists() else ""
            output = Path(scratch) / target.name if options.check else target
            if options.check:
                output.write_text(present)
            compile_(source, extra, output, options.upgrade)
            if output.read_text() != present:
                stale.append(name)
    if options.check and stale:
        print(f"out of date: {', '.join(stale)}; run `make requirements`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
