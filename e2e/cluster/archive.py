"""Images of one program each, written as docker-archive files without any builder.

The cluster's own parts are static programs: an image of one is a tar of a tar and two pieces of
JSON. Same input, same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write(
    target: Path,
    tag: str,
    files: Mapping[str, Path],
    entrypoint: Sequence[str],
    machine: str,
    links: Sequence[tuple[str, str]] = (),
) -> None:
    """An image of `files` (path in it -> file) and symbolic `links` (path, target).

    `machine` is the processor as `platform.machine()` names it. Replaces `target` atomically.
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        folders = {
            str(parent)
            for path in [*files, *(link for link, _ in links)]
            for parent in Path(path).parents
        } - {"/", "."}
        for folder in [*sorted(folders), "tmp"]:
            member = tarfile.TarInfo(folder.lstrip("/"))
            member.type, member.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(member)
        for path, source in files.items():
            member = tarfile.TarInfo(path.lstrip("/"))
            member.size, member.mode = source.stat().st_size, 0o755
            with source.open("rb") as program:
                tar.addfile(member, program)
        for path, goal in links:
            member = tarfile.TarInfo(path.lstrip("/"))
            member.type, member.linkname, member.mode = tarfile.SYMTYPE, goal, 0o777
            tar.addfile(member)
    content = layer.getvalue()
    config = json.dumps(
        {
            "architecture": ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": {"Entrypoint": list(entrypoint), "Env": ["PATH=/bin"], "User": ""},
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"],
            },
            "history": [{"created_by": "dynamo e2e"}],
        }
    ).encode()
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": [tag], "Layers": ["layer.tar"]}]).encode()
    part = target.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for path, data in ((name, config), ("layer.tar", content), ("manifest.json", manifest)):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    part.rename(target)
