"""What holds of every image before it is built: pinned parts, no root, nothing of this machine."""

from __future__ import annotations

import itertools
import os
import re
import tomllib
from pathlib import Path

import pytest
from dynamo_operator.render.platform import IMAGE_NAMES, OWN_REPOSITORY, Platform

from images.build import IMAGES, Image, lent

ROOT = Path(__file__).resolve().parents[2]
PIP_INSTALL = r"\bpip\b.* install "
FILES = sorted((ROOT / "images").glob("*Containerfile"))


def stages(path: Path) -> list[list[str]]:
    """The instructions of each stage, continued lines joined, without what precedes the first."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line and not line.startswith("#")]
    found: list[list[str]] = []
    for line in lines:
        if line.startswith("FROM "):
            found.append([])
        if found:
            found[-1].append(line)
    return found


def test_every_image_that_graphs_are_rendered_with_is_built() -> None:
    built = {name for image in IMAGES for name in image.names}
    for name in (*IMAGE_NAMES, "operator"):
        assert f"docker.io/{Platform().image(name)}" in built


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_an_image_is_made_of_what_there_is(image: Image) -> None:
    path = ROOT / "images" / image.file
    names = [line.split()[-1] for stage in stages(path) for line in stage[:1] if " AS " in line]
    assert not image.target or image.target in names
    for key, _, value in (argument.partition("=") for argument in image.arguments):
        assert f"ARG {key}" in path.read_text()
        if key in ("EXTRA", "ALSO"):
            assert (ROOT / "requirements" / f"{value}.txt").exists()
        if key == "WORKER":
            assert OWN_REPOSITORY in value


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_requirements_that_go_together_agree(image: Image) -> None:
    files = [
        argument.partition("=")[2]
        for argument in image.arguments
        if argument.startswith(("EXTRA=", "ALSO="))
    ]
    pinned: list[dict[str, set[str]]] = []
    for file in files:
        pins: dict[str, set[str]] = {}  # package -> versions, of which markers choose one
        text = (ROOT / "requirements" / f"{file}.txt").read_text()
        for name, version in re.findall(r"^([a-z0-9-]+)==(.+)", text, re.MULTILINE):
            pins.setdefault(name, set()).add(version)
        pinned.append(pins)
    for one, other in itertools.pairwise(pinned):
        assert {name: one[name] for name in one.keys() & other.keys()} == {
            name: other[name] for name in one.keys() & other.keys()
        }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_installed_is_pinned(path: Path) -> None:
    installs = [line for stage in stages(path) for line in stage if re.search(PIP_INSTALL, line)]
    assert installs
    assert all("--require-hashes" in line or "/wheel/" in line for line in installs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_runs_without_root_and_without_a_package_manager(path: Path) -> None:
    *_, last = stages(path)
    users = [line for stage in stages(path) for line in stage if line.startswith("USER ")]
    assert users[-1] == "USER 65532:65532"
    assert not any(" install " in line for line in last)


def test_the_code_is_the_last_thing_copied() -> None:
    *_, last = stages(ROOT / "images" / "Containerfile")
    copies = [line for line in last if line.startswith("COPY ")]
    assert [line.split()[1] for line in copies] == ["--from=dependencies", "--from=project"]


def test_the_builder_sees_every_package() -> None:
    admitted = (ROOT / ".containerignore").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for package in packages:
        assert f"!{package.partition('/')[0]}" in admitted


def test_pip_is_lent_this_machines_settings(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    env = {"PIP_CERT": "/a.crt", "PIP_FIND_LINKS": f"{wheels}", "PIP_QUIET": "", "HOME": "/x"}
    volumes = lent(env, tmp_path)
    assert (
        tmp_path / "pip.conf"
    ).read_text() == f"[global]\ncert = /a.crt\nfind-links = {wheels}\n"
    assert f"{wheels}:{wheels}:ro" in volumes
    assert all(volume.endswith(":ro") for volume in volumes)
    assert not any(os.sep + "x" == volume.partition(":")[0] for volume in volumes)
