"""Whether what a container mounts is there, as far as the machine that submits can know."""

from __future__ import annotations

from pathlib import Path

from nemotron_recipes.executors.slurm.container import missing_here
from nemotron_recipes.executors.slurm.profile import SlurmProfile


def test_what_shared_folders_do_not_hold_is_missing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    image, mounts = str(tmp_path / "no.sqsh"), [f"{tmp_path}/there:/a", f"{tmp_path}/no/such:/b", "tmpfs:/c"]
    profile = SlurmProfile(container_image=image, mounts=mounts)
    run = str(tmp_path / "runs/run")
    assert [*missing_here(profile, run)] == [("container_image", image), ("mounts", f"{tmp_path}/no/such")]
    kept = SlurmProfile(container_image=image, container_name="kept")
    assert [*missing_here(kept, run)] == []
    assert [*missing_here(SlurmProfile(container=False, container_image=image, mounts=mounts), run)] == []


def test_of_folders_that_are_each_nodes_own_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "link.sqsh").symlink_to("/dev/shm/no.sqsh")
    for image in ("/dev/shm/no.sqsh", str(tmp_path / "link.sqsh"), "nvcr.io/nvidia/nemo:1"):
        profile = SlurmProfile(container_image=image, mounts=["/proc/no:/a", "/dev/shm/no/such:/b"])
        assert [*missing_here(profile, str(tmp_path))] == []
