"""What image names and mounts become for Pyxis, and which of them it could make nothing of."""

from __future__ import annotations

import pytest

from nemotron_recipes.executors.images.enroot import Mount, Unusable, image_for_pyxis, parse_mount

DIGEST = "@sha256:" + "0a" * 32
AS_TAG = DIGEST.replace("@", ":")  # which enroot 3 takes as well


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        # the same image of NVIDIA's registry, as people write it
        ("nvcr.io/nvidia/nemo:25.07", "nvcr.io#nvidia/nemo:25.07"),
        ("nvcr.io#nvidia/nemo:25.07", "nvcr.io#nvidia/nemo:25.07"),
        ("docker://nvcr.io/nvidia/nemo:25.07", "nvcr.io#nvidia/nemo:25.07"),
        ("docker://nvcr.io#nvidia/nemo:25.07", "nvcr.io#nvidia/nemo:25.07"),
        ("nvcr.io/nvidia/nemo", "nvcr.io#nvidia/nemo"),
        (f"nvcr.io/nvidia/nemo{DIGEST}", f"nvcr.io#nvidia/nemo{AS_TAG}"),
        (f"nvcr.io/nvidia/nemo:25.07{DIGEST}", f"nvcr.io#nvidia/nemo{AS_TAG}"),
        (f"ubuntu{DIGEST}", f"ubuntu{AS_TAG}"),
        ("$oauthtoken@nvcr.io/nvidia/nemo:25.07", "$oauthtoken@nvcr.io#nvidia/nemo:25.07"),
        ("me@example.org@nvcr.io#nvidia/nemo", "me@example.org@nvcr.io#nvidia/nemo"),
        ("nvcr.io/nvidia/nemo-rl:v0.4.0.nemotron_3_nano", "nvcr.io#nvidia/nemo-rl:v0.4.0.nemotron_3_nano"),
        # other registries
        ("NVCR.io/nvidia/nemo:A", "nvcr.io#nvidia/nemo:A"),
        ("ghcr.io/org/team/image:v1", "ghcr.io#org/team/image:v1"),
        ("gitlab.example.org:5005/group/image:1", "gitlab.example.org:5005#group/image:1"),
        ("localhost/image", "localhost#image"),
        ("localhost:5000/image:1", "localhost:5000#image:1"),
        ("registry:5000/image", "registry:5000#image"),
        # Docker Hub
        ("ubuntu", "ubuntu"),
        ("ubuntu:24.04", "ubuntu:24.04"),
        ("nvidia/cuda:12.8.0-base-ubuntu24.04", "nvidia/cuda:12.8.0-base-ubuntu24.04"),
        ("docker://ubuntu:24.04", "ubuntu:24.04"),
        ("docker.io/nvidia/cuda:12", "nvidia/cuda:12"),
        ("docker.io/library/ubuntu", "library/ubuntu"),
        ("dockerd://my-image:latest", "dockerd://my-image:latest"),
        # files
        ("/lustre/images/nemo-25.07.sqsh", "/lustre/images/nemo-25.07.sqsh"),
        ("/lustre/images/it's $HOME.sqsh", "/lustre/images/it's $HOME.sqsh"),
        ("/lustre/images/nemo", "/lustre/images/nemo"),
    ],
)
def test_image(written: str, taken: str) -> None:
    assert image_for_pyxis(written) == taken
    assert image_for_pyxis(taken) == taken, "what Pyxis takes stays as it is"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("", "no image"),
        (" nvcr.io/nvidia/nemo", "no image"),
        ("nvcr.io/nvidia/nemo:25.07 --privileged", "no image"),
        ("nvcr.io/NVIDIA/nemo", "no image"),
        ("nvcr.io/nvidia/nemo:", "no image"),
        ("nvcr.io/nvidia/nemo:a:b", "no image"),
        ("nvcr.io/nvidia/nemo@sha256:abc", "no image"),
        ("nvcr.io//nemo", "no image"),
        (f"nvcr.io/nvidia/nemo:1@sha512:{'a' * 128}", "no image"),
        (f"nvcr.io/nvidia/nemo:{'a' * 129}", "no image"),
        ("docker://me:hunter2@nvcr.io/nvidia/nemo:1", "^an image is named with a password$"),
        ("nvcr.io#", "no image"),
        ("nemo.sqsh", "relative path"),
        ("images/nemo.sqsh", "relative path"),
        ("./nemo.sqsh", "relative path"),
        ("../nemo.sqsh", "relative path"),
        ("~/nemo.sqsh", "relative path"),
        ("/lustre/images/", "folder"),
        ("oras://example.org/image", "oras://"),
        ("file:///lustre/nemo.sqsh", "file://"),
        ("podman://image", "podman://"),
        ("a\nb", "no image"),
    ],
)
def test_no_image(written: str, told: str) -> None:
    with pytest.raises(Unusable, match=told) as refused:
        image_for_pyxis(written)
    assert refused.value.fix


@pytest.mark.parametrize(
    ("written", "mount"),
    [
        ("/lustre:/lustre", Mount("/lustre", "/lustre")),
        ("/lustre", Mount("/lustre", "/lustre")),
        ("/home/me/Automodel:/opt/Automodel:ro", Mount("/home/me/Automodel", "/opt/Automodel", ("ro",))),
        ("/a b:/c d:ro+nosuid", Mount("/a b", "/c d", ("ro", "nosuid"))),
        ("tmpfs:/scratch:size=1g", Mount("tmpfs", "/scratch", ("size=1g",))),
    ],
)
def test_mount(written: str, mount: Mount) -> None:
    assert parse_mount(written) == mount
    assert parse_mount(str(mount)) == mount


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("", "no mount"),
        (":/b", "no mount"),
        ("/a:", "no mount"),
        ("/a:/b:ro:rw", "no mount"),
        ("/a:/b,/c:/d", "comma"),
        ("/a:/b:ro,nosuid", "comma"),
        ("a:/b", "full path"),
        ("~/a:/b", "full path"),
        ("./a:/b", "full path"),
        ("/a:b", "in the container"),
        ("/a:ro", "in the container"),
        ("/a:/b:r0", "'r0'"),
        ("/a:/b:z", "'z'"),
        ("/a:/b:", "''"),
    ],
)
def test_no_mount(written: str, told: str) -> None:
    with pytest.raises(Unusable, match=told) as refused:
        parse_mount(written)
    assert refused.value.fix
