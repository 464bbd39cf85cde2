"""Path substitution, and what is refused because it can't be done by it."""

from pathlib import Path

import pytest
from dynamo_cli.local.volumes import (
    Mount,
    Refused,
    Substitution,
    Volume,
    check_mount,
    link_nested,
    make_volume,
    mount_folder,
    parse_mount,
    parse_volume,
)

REAL = Path("/real/models")
substitute = Substitution(
    {"/models": REAL, "/models/nested": Path("/other"), "/run/kv": Path("/k")}
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/models", "/real/models"),
        ("/models/tiny", "/real/models/tiny"),
        ("--model=/models/tiny", "--model=/real/models/tiny"),
        ("/models/nested/x", "/other/x"),
        ("/models/nestedly", "/real/models/nestedly"),
        ("cat /models/a; ls '/models'", "cat /real/models/a; ls '/real/models'"),
        ("PATH=/bin:/models/bin", "PATH=/bin:/real/models/bin"),
        ('{"endpoint":"ipc:///run/kv/a"}', '{"endpoint":"ipc:///k/a"}'),
        ("file:///models", "file:///real/models"),
        ("/models2", "/models2"),
        ("/models-big/x", "/models-big/x"),
        ("/models.bak", "/models.bak"),
        ("/srv/models/x", "/srv/models/x"),
        ("http://host/models/x", "http://host/models/x"),
        ("s3://models/x", "s3://models/x"),
        ("relative/models", "relative/models"),
        ("${HOME}/models", "${HOME}/models"),
        ("~/models", "~/models"),
    ],
)
def test_a_mount_path_is_replaced_at_path_boundaries_only(text: str, expected: str) -> None:
    assert substitute(text) == expected


def test_a_mount_at_tmp_does_not_catch_its_own_replacement() -> None:
    at_tmp = Substitution({"/tmp": Path("/tmp/run/v/tmp")})
    assert at_tmp("/tmp/x:/tmp") == "/tmp/run/v/tmp/x:/tmp/run/v/tmp"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"persistentVolumeClaim": {"claimName": "c"}}, "volume 'v': a PersistentVolumeClaim"),
        ({"hostPath": {"path": "/x"}}, "volume 'v': a hostPath"),
        ({"secret": {"secretName": "s"}}, "volume 'v': files of a Secret"),
        ({"projected": {}}, "volume 'v': a projected volume"),
        ({"csi": {}}, "volume 'v': a CSI volume"),
        ({"iscsi": {}}, "volume 'v': iscsi needs a cluster"),
        ({"configMap": {"name": "none"}}, "ConfigMap 'none' is not in the file"),
        ({"configMap": {"name": "c", "items": [{"key": "k", "path": "../x"}]}}, "relative path"),
        ({"configMap": {"name": "c", "items": [{"key": "z", "path": "x"}]}}, "no key 'z'"),
    ],
)
def test_volumes_that_need_a_cluster_are_refused_by_name(raw: dict[str, object], says: str) -> None:
    with pytest.raises(Refused, match=says):
        parse_volume({"name": "v", **raw}, {"c": {"k": "text"}})


def test_config_map_items_choose_and_rename_files(tmp_path: Path) -> None:
    raw = {"name": "v", "configMap": {"name": "c", "items": [{"key": "k", "path": "sub/f.yaml"}]}}
    volume = parse_volume(raw, {"c": {"k": "text", "other": "no"}})
    make_volume(volume, tmp_path / "v", {})
    assert [p.name for p in (tmp_path / "v").rglob("*")] == ["sub", "f.yaml"]
    assert (tmp_path / "v/sub/f.yaml").read_text() == "text"


def test_a_sub_path_must_stay_in_its_volume(tmp_path: Path) -> None:
    assert mount_folder(tmp_path, "a/b") == tmp_path / "a/b"
    with pytest.raises(Refused, match=r"without '\.\.'"):
        mount_folder(tmp_path, "../x")
    with pytest.raises(Refused, match=r"without '\.\.'"):
        parse_mount({"name": "v", "mountPath": "/x", "subPath": "/etc"})


def test_a_mount_inside_another_is_seen_through_it(tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    outer.mkdir()
    inner.mkdir()
    (inner / "file").write_text("x")
    link_nested({"/data": outer, "/data/models": inner})
    assert (outer / "models" / "file").read_text() == "x"


@pytest.mark.parametrize("path", ["/usr/local/lib/x", "/dev/infiniband", "/proc", "/lib64/x", "/",
                                  "/etc", "/root", "/etc/passwd"])  # fmt: skip
def test_mounts_over_system_paths_are_refused_even_if_named(path: str) -> None:
    with pytest.raises(Refused, match=f"at {path}: "):
        check_mount(Mount("v", path), Volume("v", "emptyDir"), [path])


def test_a_config_map_that_nothing_names_is_refused_and_an_empty_dir_noted() -> None:
    mount = Mount("v", "/opt/cfg")
    with pytest.raises(Refused, match="must know it by itself"):
        check_mount(mount, Volume("v", "configMap"), ["--config", "/opt/cfgs"])
    assert check_mount(mount, Volume("v", "configMap"), ["--config=/opt/cfg/a"]) is None
    note = check_mount(mount, Volume("v", "emptyDir"), [])
    assert note is not None
    assert "/opt/cfg" in note


def test_shared_memory_is_the_machines_own() -> None:
    note = check_mount(Mount("shm", "/dev/shm"), Volume("shm", "emptyDir"), [])
    assert note is not None
    assert "/dev/shm" in note
