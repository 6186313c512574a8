"""Whether what a container mounts is there, as far as the machine that submits can know."""

from __future__ import annotations

from pathlib import Path

from nemotron_recipes.executors.enroot import Mount
from nemotron_recipes.executors.slurm_container import Container, missing_here


def test_what_shared_folders_do_not_hold_is_missing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    mounts = (Mount(str(tmp_path / "there"), "/a"), Mount(str(tmp_path / "no/such"), "/b"), Mount("tmpfs", "/c"))
    container = Container(str(tmp_path / "no.sqsh"), "", mounts, ())
    assert [*missing_here(container, str(tmp_path / "runs/run"))] == [
        ("container_image", str(tmp_path / "no.sqsh")),
        ("mounts", str(tmp_path / "no/such")),
    ]


def test_of_folders_that_are_each_nodes_own_nothing_is_known(tmp_path: Path) -> None:
    container = Container("/dev/shm/no.sqsh", "", (Mount("/proc/no", "/a"), Mount("/dev/shm/no/such", "/b")), ())
    assert [*missing_here(container, str(tmp_path))] == []
    (tmp_path / "link.sqsh").symlink_to("/dev/shm/no.sqsh")
    assert [*missing_here(Container(str(tmp_path / "link.sqsh"), "", (), ()), str(tmp_path))] == []
    assert [*missing_here(Container("nvcr.io#nvidia/nemo:1", "", (), ()), str(tmp_path))] == []
