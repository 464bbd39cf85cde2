"""Volumes without mounts: real folders, and their paths put where a manifest names the mount.

A process that isn't in a container can't have a file system of its own. But most programs learn
their paths from their command line and environment, so a mount at ``/models`` works by giving the
program ``<pod folder>/models`` wherever its manifest says ``/models``. Where a program would look
at the true path regardless, that is refused by name rather than half done.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

# Folders whose content belongs to the machine: a program finds its own files here by fixed paths.
SYSTEM_TREES = ("/bin", "/boot", "/dev", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin",
                "/sys", "/usr")  # fmt: skip
# Folders whose children may be mounted, but which can't be replaced themselves.
SYSTEM_FOLDERS = ("/", "/etc", "/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/var",
                  "/var/lib", "/var/run")  # fmt: skip

SHARED_MEMORY_NOTE = "the machine's own /dev/shm is used, without a pod's limit on its size"


class Refused(Exception):
    """A volume or mount that only a container can have; the message names it and the reason."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A folder that lives as long as its pod. ``files``: path in the volume -> text."""

    name: str
    kind: Literal["emptyDir", "configMap", "downwardAPI"]
    files: tuple[tuple[str, str], ...] = ()
    fields: tuple[tuple[str, str], ...] = ()  # downwardAPI: path in the volume -> fieldPath


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume at ``path`` of a container; ``sub_path`` is the part of the volume that is seen."""

    volume: str
    path: str
    sub_path: str = ""
    sub_path_expression: str = ""


def _relative(text: str, what: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts:
        raise Refused(f"{what} {text!r} must be a relative path without '..'")
    return str(path)


_OTHERS = {
    "persistentVolumeClaim": "a PersistentVolumeClaim needs a cluster's storage",
    "hostPath": "a hostPath would be the machine's own files at another path",
    "secret": "files of a Secret aren't written to a machine's disk",
    "projected": "a projected volume needs the kubelet",
    "csi": "a CSI volume needs its driver",
    "ephemeral": "an ephemeral volume needs a cluster's storage",
    "nfs": "a process can't mount NFS",
    "image": "an image volume needs a container runtime",
}


def parse_volume(raw: Mapping[str, Any], config_maps: Mapping[str, Mapping[str, str]]) -> Volume:
    """A volume of a pod. Raises ``Refused`` for one that only a cluster has."""
    name = str(raw.get("name", ""))
    if "emptyDir" in raw or set(raw) == {"name"}:
        return Volume(name, "emptyDir")
    if (source := raw.get("configMap")) is not None:
        wanted = str(source.get("name", ""))
        data = config_maps.get(wanted)
        if data is None:
            if source.get("optional"):
                return Volume(name, "configMap")
            raise Refused(f"volume {name!r}: ConfigMap {wanted!r} is not in the file")
        if not (items := source.get("items")):
            return Volume(name, "configMap", tuple(data.items()))
        files: list[tuple[str, str]] = []
        for item in items:
            if item["key"] in data:
                path = _relative(str(item["path"]), f"volume {name!r}: path")
                files.append((path, data[item["key"]]))
            elif not source.get("optional"):
                raise Refused(f"volume {name!r}: ConfigMap {wanted!r} has no key {item['key']!r}")
        return Volume(name, "configMap", tuple(files))
    if (source := raw.get("downwardAPI")) is not None:
        fields: list[tuple[str, str]] = []
        for item in source.get("items") or ():
            if "fieldRef" not in item:
                raise Refused(f"volume {name!r}: downwardAPI with resourceFieldRef needs a cluster")
            path = _relative(str(item["path"]), f"volume {name!r}: path")
            fields.append((path, str(item["fieldRef"]["fieldPath"])))
        return Volume(name, "downwardAPI", fields=tuple(fields))
    kind = next((key for key in raw if key != "name"), "nothing")
    raise Refused(f"volume {name!r}: {_OTHERS.get(kind, f'{kind} needs a cluster')}")


def parse_mount(raw: Mapping[str, Any]) -> Mount:
    """A volumeMount of a container. Raises ``Refused`` for a path that can't be stood in for."""
    path = str(raw.get("mountPath", ""))
    if not path.startswith("/"):
        raise Refused(f"mountPath {path!r} must be an absolute path")
    path = str(PurePosixPath(path))
    return Mount(
        volume=str(raw.get("name", "")),
        path=path,
        sub_path=_relative(str(raw["subPath"]), "subPath") if raw.get("subPath") else "",
        sub_path_expression=str(raw.get("subPathExpr") or ""),
    )


def check_mount(mount: Mount, volume: Volume, texts: Iterable[str]) -> str | None:
    """Whether a process can do without the true mount; ``texts`` is all its manifest tells it.

    Returns a note for the user or ``None``. Raises ``Refused``.
    """
    what = f"volume {mount.volume!r} at {mount.path}"
    if mount.path == "/dev/shm":
        return SHARED_MEMORY_NOTE
    tree = next((t for t in SYSTEM_TREES if _inside(mount.path, t)), None)
    if tree is not None:
        raise Refused(f"{what}: {tree} belongs to the machine; only a container can mount over it")
    if mount.path in SYSTEM_FOLDERS:
        raise Refused(f"{what}: only a container can mount over {mount.path}")
    if _inside(mount.path, "/etc") and Path(mount.path).exists():
        raise Refused(f"{what}: the machine has its own {mount.path}")
    if mount.path in ("/tmp", "/var/tmp"):
        return None  # every pod has its own TMPDIR
    pattern = _pattern([mount.path])
    if any(pattern.search(text) for text in texts):
        return None
    if volume.kind == "emptyDir":
        return f"{what}: nothing names this path, so it is left out"
    raise Refused(
        f"{what}: neither command, args nor env name this path, so the program must know it by "
        "itself; only a container can put files there"
    )


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _pattern(paths: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the paths, whole or as a prefix at a path boundary, also after ``scheme://``."""
    longest_first = sorted(paths, key=len, reverse=True)
    alternatives = "|".join(re.escape(path) for path in longest_first)
    return re.compile(rf"(?:(?<=://)|(?<![\w.~/\\)}}*-]))(?:{alternatives})(?![\w.~-])")


class Substitution:
    """Puts real folders where a container's manifest names its mounts."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = {path: str(real) for path, real in folders.items()}
        self._pattern = _pattern(list(folders)) if folders else None

    def __call__(self, text: str) -> str:
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._folders[match[0]], text)


def make_volume(volume: Volume, folder: Path, fields: Mapping[str, str]) -> None:
    """Create a volume's folder with its files. ``fields``: values of the downward API, by path."""
    folder.mkdir(parents=True)
    for path, text in (*volume.files, *fields.items()):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def mount_folder(volume_folder: Path, sub_path: str) -> Path:
    """Where a mount really is. Raises ``Refused`` for a ``subPath`` that leaves the volume."""
    return volume_folder / _relative(sub_path, "subPath") if sub_path else volume_folder


def link_nested(folders: Mapping[str, Path]) -> None:
    """A mount inside another mount is seen there too, as a link."""
    for outer, outer_folder in folders.items():
        for inner, inner_folder in folders.items():
            if inner != outer and _inside(inner, outer) and outer_folder.is_dir():
                link = outer_folder / PurePosixPath(inner).relative_to(outer)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists() and not link.is_symlink():
                    link.symlink_to(inner_folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours with all it holds; one that is gone is no error."""
    shutil.rmtree(folder, ignore_errors=True)
