"""The list of images; what a real registry says of one; a squashfs file that is imported once, whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from nemotron_recipes import image_list
from nemotron_recipes.backends import REGISTRY as BACKENDS
from nemotron_recipes.backends.data_prep import IMPORTS as DATA_PREP
from nemotron_recipes.backends.trl import IMPORTS as TRL
from nemotron_recipes.cli import main
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.docker.control import Docker
from nemotron_recipes.executors.images import catalog, check, lock
from nemotron_recipes.executors.images.credentials import find_credentials
from nemotron_recipes.executors.images.enroot import Reference, architecture, parse_reference
from nemotron_recipes.executors.images.registry import Found, look_up
from nemotron_recipes.executors.images.squashfs import is_whole
from tests.helpers import docker
from tests.helpers.cli import ROOT, nemotron
from tests.helpers.executor_harness import wait_for
from tests.helpers.registry import PASSWORD, USER, Registry, registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.docker
HERE = architecture(platform.machine())


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("registry") / "public") as made:
        yield made


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("registry") / "private", private=True) as made:
        yield made


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # no project: nothing is kept
    for name in ("NGC_API_KEY", "DOCKER_CONFIG", "ENROOT_CONFIG_PATH", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the list of images one of these alone: reference, and what else is known of it."""
    (tmp_path / "containers").mkdir()
    monkeypatch.setattr(image_list, "folder", lambda: tmp_path / "containers")

    def write(reference: str, **facts: str) -> None:
        lines = [f"{key} = {json.dumps(value)}" for key, value in {"reference": reference, **facts}.items()]
        text = "\n".join(["[[image]]", *lines, "backends = []", "stages = []"])
        (tmp_path / "containers" / "images.toml").write_text(text + "\n")

    return write


@pytest.fixture
def fake_enroot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake of enroot, which packs a folder as a real squashfs file; it waits while the file `hold` is there."""
    folder = tmp_path / "fake_enroot"
    folder.mkdir()
    (folder / "content").mkdir()
    packs = shutil.which("mksquashfs", path=f"{os.environ['PATH']}:/usr/sbin")
    if packs is None:
        pytest.skip("no mksquashfs here; make test-system")
    (folder / "enroot").write_text(
        f'#!/bin/sh\necho "$@" >> \'{folder}/calls\'\nhead -c 100 /dev/zero > "$5"\n'
        f"while [ -e '{folder}/hold' ]; do sleep 0.05; done\n"
        f"[ -e '{folder}/half' ] && exit 0\n"
        f"rm \"$5\"; exec '{packs}' '{folder}/content' \"$5\" -quiet -no-progress\n"
    )
    (folder / "enroot").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def test_the_list_is_sound() -> None:
    known = catalog.known_images()
    assert len({image.reference for image in known}) == len(known)
    made = [backend for image in known for backend in image.backends]
    assert {name for name in BACKENDS if name != "data_prep"} <= set(made), "every backend has an image"
    for image in known:
        for fact in ("digest", "architectures", "versions"):
            assert not getattr(image, fact) or fact in image.sources, f"{image.reference}: where is {fact} from?"
        assert not image.recipe or (image_list.folder() / image.recipe).is_file()


def test_a_key_that_no_image_has_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "images.toml"
    file.write_text('[[image]]\nreference = "a/b:1"\nbackends = []\nstages = []\narchitecture = ["arm64"]\n')
    with pytest.raises(UserError, match="did you mean 'architectures'"):
        catalog.known_images(file)


def test_an_image_is_found_in_whatever_form_it_is_written() -> None:
    known = catalog.known_images()
    for written in ("nvcr.io/nvidia/nemo:26.04.00", "docker://nvcr.io#nvidia/nemo:26.04.00"):
        found = catalog.find(written, known)
        assert found is not None
        assert found.reference == "nvcr.io/nvidia/nemo:26.04.00"
    assert catalog.find("nvcr.io/nvidia/nemo:1", known) is None
    assert parse_reference("ubuntu:24.04").for_docker == "docker.io/ubuntu:24.04"
    assert parse_reference("docker.io/library/ubuntu").for_pyxis == "library/ubuntu"


def test_what_a_registry_says(public: Registry) -> None:
    digest = public.put_image("team/one", "1", "arm64")
    assert look_up(parse_reference(f"{public.host}/team/one:1")) == Found(digest, ("arm64",))
    digest = public.put_image("team/both", "1", "amd64", "arm64")
    assert look_up(parse_reference(f"{public.host}/team/both:1")) == Found(digest, ("amd64", "arm64"))
    assert look_up(parse_reference(f"{public.host}/team/both@{digest}")).digest == digest
    with pytest.raises(UserError, match="there is no image"):
        look_up(parse_reference(f"{public.host}/team/both:2"))
    with pytest.raises(UserError, match="does not answer"):
        look_up(parse_reference("127.0.0.1:1/team/both:1"))


def test_credentials_are_found_and_never_shown(private: Registry, tmp_path: Path) -> None:
    digest = private.put_image("team/secret", "1", "amd64")
    image = parse_reference(f"{private.host}/team/secret:1")
    with pytest.raises(UserError, match="no credentials were used"):
        look_up(image)
    for place, text in (
        (".docker/config.json", json.dumps({"auths": {private.host: {"auth": private.auth}}})),
        (".config/enroot/.credentials", f"machine {private.host} login {USER} password {PASSWORD}\n"),
    ):
        file = tmp_path / "home" / place
        file.parent.mkdir(parents=True)
        file.write_text(text)
        assert look_up(image).digest == digest
        found = find_credentials(private.host)
        assert found is not None
        assert (found.user, found.source) == (USER, str(file))
        assert PASSWORD not in repr(found)
        file.write_text(text.replace(PASSWORD, "wrong-secret").replace(private.auth, "d3Jvbmc6d3Jvbmc="))
        with pytest.raises(UserError) as refused:
            look_up(image)
        assert str(file) in str(refused.value)
        assert "wrong" not in str(refused.value).replace(str(file), "")
        file.unlink()
    key = find_credentials("nvcr.io", {"NGC_API_KEY": PASSWORD, "HOME": str(tmp_path)})
    assert key is not None
    assert (key.user, key.source) == ("$oauthtoken", "$NGC_API_KEY")
    assert PASSWORD not in repr(key)


def test_a_credential_helper_is_asked_and_says_nothing_of_it(
    private: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docker's helpers are programs; this fake one speaks their protocol."""
    private.put_image("team/helped", "1", "amd64")
    image = parse_reference(f"{private.host}/team/helped:1")
    helper = tmp_path / "bin" / "docker-credential-fake"
    helper.parent.mkdir()
    monkeypatch.setenv("PATH", str(helper.parent), prepend=os.pathsep)
    config = tmp_path / "home" / ".docker" / "config.json"
    config.parent.mkdir(parents=True)

    def says(text: str, code: int = 0) -> None:
        helper.write_text(f"#!/bin/sh\ncat > '{tmp_path}/asked'\ncat << 'END'\n{text}\nEND\nexit {code}\n")
        helper.chmod(0o755)

    for entry in ({"credHelpers": {private.host: "fake"}}, {"credsStore": "fake", "auths": {private.host: {}}}):
        config.write_text(json.dumps(entry))
        says(json.dumps({"ServerURL": private.host, "Username": USER, "Secret": PASSWORD}))
        assert look_up(image).architectures == ("amd64",)
        assert (tmp_path / "asked").read_text() == private.host
        says("credentials not found in native keychain", 1)
        assert find_credentials(private.host) is None
    for text, code, told in (
        ("no such keyring " + PASSWORD, 1, "ended with 1"),
        ("not JSON " + PASSWORD, 0, "does not answer as such"),
        (json.dumps({"Username": "<token>", "Secret": PASSWORD}), 0, "identity token"),
    ):
        says(text, code)
        with pytest.raises(UserError, match=told) as refused:
            look_up(image)
        assert PASSWORD not in str(refused.value)
    helper.unlink()
    with pytest.raises(UserError, match="docker-credential-fake, which can't be run"):
        look_up(image)
    config.write_text('{"auths": {"' + PASSWORD)
    with pytest.raises(UserError, match="can't be read") as refused:
        look_up(image)
    assert PASSWORD not in str(refused.value)


def test_a_moved_tag_and_a_wrong_architecture_are_told() -> None:
    pinned = catalog.Image("r.io/a:1", (), (), digest="sha256:old", architectures=("amd64", "arm64"))
    told = [str(problem) for problem in catalog.differences(pinned, Found("sha256:new", ("amd64",)), "arm64")]
    assert len(told) == 3
    assert "the tag has moved" in told[0]
    assert "r.io/a:1@sha256:old" in told[0]
    assert "not there for arm64" in told[1]
    assert "is for amd64, not for arm64" in told[2]
    assert not [*catalog.differences(pinned, Found("sha256:old", ("amd64", "arm64")), "arm64")]


def test_check_on_the_command_line(public: Registry, tmp_path: Path) -> None:
    digest = public.put_image("team/check", "1", "amd64")
    said = nemotron(tmp_path, "images", "check", f"{public.host}/team/check:1", "--arch", "amd64", "--json")
    (told,) = json.loads(said)["images"]
    assert (told["digest"], told["architectures"]) == (digest, ["amd64"])
    nemotron(tmp_path, "images", "check", f"{public.host}/team/check:1", "--arch", "arm64", code=2)
    nemotron(tmp_path, "images", "check", "not an image", code=2)
    assert "nvcr.io/nvidia/nemo:26.04.00" in nemotron(tmp_path, "images", "list")


def test_a_digest_that_nobody_lists_is_kept_with_the_project(
    public: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fake_enroot: Path,
) -> None:
    """The first one that is seen; a tag that moves afterwards is said before anything is queued."""
    (tmp_path / "project" / "below").mkdir(parents=True)
    (tmp_path / "project" / "env.toml").touch()
    monkeypatch.chdir(tmp_path / "project" / "below")
    name, kept = f"{public.host}/team/kept:1", tmp_path / "project" / "images.lock.json"

    def look(*words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main.main(["images", "check", name, "--arch", "any", *words])
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        return out + err

    first = public.put_image("team/kept", "1", "amd64", note="first")
    assert str(kept) in look() and json.loads(kept.read_text())[name]["digest"] == first
    assert "images.lock.json" in look() and first not in told(check.of_registry(name, ("amd64",), "", False))[1]
    second = public.put_image("team/kept", "1", "amd64", note="second")
    said = look(code=2)
    assert f"was {first}, and is {second} now" in said and f"nemotron images check --accept {name}" in said
    refused, _ = told(check.of_registry(name, ("amd64",), "stage sft", False))
    assert f"images.lock.json has {first}, this is {second}" in refused
    for chosen, done in ((name, 2), (f"{name}@{second}", 0), (f"{name}@{first}", 0)):  # who names a digest has chosen
        with pytest.raises(SystemExit) as ended:
            main.main(["images", "import", chosen, "--arch", "amd64", "--to", "images"])
        assert ended.value.code == done, capsys.readouterr().err
    assert json.loads(kept.read_text())[name]["digest"] == first
    assert str(kept) in look("--accept") and told(check.of_registry(name, ("amd64",), "", False)) == ("", "")
    with pytest.raises(SystemExit):
        main.main(["images", "list", "--json"])
    listed = {image["reference"]: image for image in json.loads(capsys.readouterr().out)}
    assert (listed[name]["digest"], listed[name]["digest_from"]) == (second, "images.lock.json")
    assert not listed["nvcr.io/nvidia/nemo:26.04.00"]["digest"]
    kept.write_text("[]")
    assert "can't be read" in look(code=2)


def test_several_that_keep_digests_at_once_lose_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env.toml").touch()
    monkeypatch.chdir(tmp_path)
    images = {f"here.invalid/team/image:{number}": f"sha256:{number:064x}" for number in range(8)}
    together = threading.Barrier(len(images))

    def keep(name: str) -> Path | None:
        together.wait(60)
        return lock.keep({name: images[name]})

    with ThreadPoolExecutor(len(images)) as pool:
        assert [*pool.map(keep, images)] == [tmp_path / lock.NAME] * len(images)
    assert lock.digests() == images


def test_an_import_carries_the_digest_in_its_name(public: Registry, tmp_path: Path, fake_enroot: Path) -> None:
    for note in ("first", "second", "second"):
        digest = public.put_image("team/import", "1", "amd64", "arm64", note=note)
        said = nemotron(tmp_path, "images", "import", f"{public.host}/team/import:1", "--to", "images")
        file = tmp_path / "images" / f"team+import+1@{digest.replace(':', '-')}.{HERE}.sqsh"
        assert said == f'container_image = "{file}"\n'
        assert is_whole(file)
    calls = (fake_enroot / "calls").read_text().splitlines()
    assert len(calls) == 2, "what is there already is not imported again"
    assert f"docker://{public.host}#team/import:{digest}" in calls[-1], "as every version of enroot takes it"
    assert f"--arch {platform.machine()} " in calls[-1]
    assert len([*(tmp_path / "images").glob("*.sqsh")]) == 2, "a moved tag does not hide behind the old file"
    other = "arm64" if HERE == "amd64" else "amd64"
    nemotron(tmp_path, "images", "import", f"{public.host}/team/import:1", "--to", "images", "--arch", other)
    named = [catalog.read_squashfs_name(str(path)) for path in (tmp_path / "images").glob("*.sqsh")]
    assert sorted(name.architecture for name in named if name) == sorted([HERE, HERE, other])
    assert all(name and name.is_of(parse_reference("team/import:1")) for name in named)


def test_of_imports_at_once_one_works_and_a_killed_one_leaves_nothing_to_use(tmp_path: Path, fake_enroot: Path) -> None:
    (fake_enroot / "hold").touch()
    target = tmp_path / "images"
    killed = _importing(target)
    wait_for((fake_enroot / "calls").exists)
    waiting = [_importing(target) for _ in range(3)]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(60)
    wait_for(lambda: len((fake_enroot / "calls").read_text().splitlines()) == 2)
    assert not [*target.glob("*.sqsh")]
    (fake_enroot / "hold").unlink()
    assert [process.wait(120) for process in waiting] == [0, 0, 0]
    assert len((fake_enroot / "calls").read_text().splitlines()) == 2
    (made,) = target.glob("*.sqsh")
    assert is_whole(made)
    assert not [*target.glob("*.partial")]


def test_half_a_file_is_no_import(tmp_path: Path, fake_enroot: Path) -> None:
    (fake_enroot / "half").touch()
    process = _importing(tmp_path / "images", stderr=subprocess.PIPE, text=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode
    assert "no whole squashfs file" in said
    assert not [path for path in (tmp_path / "images").iterdir() if path.suffix != ".lock"]
    cut = tmp_path / "cut.sqsh"
    subprocess.run(("mksquashfs", ROOT / "tests" / "helpers", cut, "-quiet", "-no-progress"), check=True)
    assert is_whole(cut)
    cut.write_bytes(cut.read_bytes()[:-5000])
    assert not is_whole(cut)


def told(problems: Iterator[Problem]) -> tuple[str, str]:
    """(what refuses, what is only said)."""
    found = [*problems]
    return tuple("\n".join(str(p) for p in found if p.refuses is grave) for grave in (True, False))  # type: ignore


def test_what_is_said_of_an_image_that_nodes_fetch(public: Registry, listing: Callable[..., None]) -> None:
    name = f"{public.host}/team/fetched:1"
    digest = public.put_image("team/fetched", "1", "arm64")

    def look(written: str = name, machines: tuple[str, ...] = ("arm64",), offline: bool = False) -> tuple[str, str]:
        return told(check.of_registry(written, machines, "stage sft", offline))

    listing("r.io/other:1")
    refused, said = look()
    assert not refused
    assert f"no digest is known for {name}" in said
    assert f'container_image = "{name}@{digest}" pins it' in said
    assert look(f"{name}@{digest}") == ("", ""), "a digest is the image, whatever its tag becomes"
    assert f"{name} is for arm64, and the nodes are amd64" in look(machines=("amd64",))[0]
    assert look(machines=("amd64", "arm64"))[0] == look(machines=())[0] == ""
    assert "there is no image" in look(f"{public.host}/team/fetched:2")[0]
    assert "could not be checked: --offline" in look(offline=True)[1]
    refused, said = look("127.0.0.1:1/team/fetched:1")
    assert not refused
    assert "could not be checked: registry 127.0.0.1:1 does not answer" in said
    assert look("dockerd://mine:1") == ("", "")
    listing(name, digest=digest)
    assert look() == ("", "")
    public.put_image("team/fetched", "1", "arm64", note="moved")
    refused, said = look()
    assert f"containers/images.toml has {digest}" in refused
    assert f'container_image = "{name}@{digest}"' in refused
    assert look(f"{name}@{digest}") == ("", "")


def test_what_is_said_of_a_squashfs_file(listing: Callable[..., None]) -> None:
    now, old = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
    listing("r.io/team/a:1", digest=now)

    def look(file: str, whole: bool = True, machines: tuple[str, ...] = ("arm64",)) -> tuple[str, str]:
        return told(check.of_squashfs(f"/images/{file}", whole, machines, "stage sft"))

    file = catalog.squashfs_name(parse_reference("r.io/team/a:1"), now, "arm64")
    assert look(file) == ("", "")
    assert "no whole squashfs file" in look(file, whole=False)[0]
    assert "is for arm64, and the nodes are amd64" in look(file, machines=("amd64",))[0]
    refused, said = look(file.replace("ab", "cd"))
    assert not refused
    assert f"is not the r.io/team/a:1 that is listed: that is {now}" in said
    assert look(file.replace("team+a+1", "team+b+1").replace("ab", "cd")) == ("", "")
    assert look(f"team+a+1@{now.replace(':', '-')}.sqsh") == ("", ""), "files of before had no architecture in the name"
    assert "its name does not tell" in look("nemo.sqsh")[1]
    assert old not in said


def test_what_is_said_of_an_image_of_docker(
    public: Registry, docker_daemon: docker.Daemon, listing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_daemon.host)
    name, other = f"{public.host}/team/pulled:1", "arm64" if HERE == "amd64" else "amd64"
    first = public.put_image("team/pulled", "1", HERE)
    public.put_image("team/pulled", "other", other)
    listing("r.io/other:1")

    def look(written: str = name, offline: bool = False) -> tuple[str, str]:
        here = Docker(docker_daemon.host).image(written)
        return told(check.of_docker(written, here, platform.machine(), "stage sft", offline))

    assert f"nemotron images import {name} --docker" in look()[0]
    assert f"in its registry it is for {other}, not for {HERE}" in look(f"{public.host}/team/pulled:other")[0]
    assert "there is no image" in look(f"{public.host}/team/pulled:no")[0]
    assert look(f"{public.host}/team/pulled:no", offline=True)[0].count("is not on this machine") == 1
    pulled = nemotron(Path.cwd(), "images", "import", name, "--docker").splitlines()[-1]
    assert pulled == f'container_image = "{name}@{first}"'
    assert look(f"{name}@{first}") == ("", ""), "as the line says that was printed"
    docker_daemon.docker("pull", "--quiet", name)
    refused, said = look()
    assert not refused
    assert f"no digest is known for {name}" in said
    assert f'"{name}@{first}" pins the one that is here' in said
    second = public.put_image("team/pulled", "1", HERE, note="moved")
    refused, said = look()
    assert not refused
    assert f"the tag has moved: {name} is {first} here, and {second} in the registry" in said
    assert "could not be checked: --offline" in look(offline=True)[1]
    listing(name, digest=second)
    assert f"containers/images.toml has {second}, this is {first}" in look()[0]
    listing(name, digest=first)
    assert look() == ("", "")
    assert look(docker.IMAGE) == ("", ""), "made here: no registry knows it"
    listing("mine:1", recipe="mine.Dockerfile")
    assert "docker build -t mine:1 -f containers/mine.Dockerfile containers" in look("mine:1")[0]


def _importing(target: Path, **options: Any) -> subprocess.Popen[Any]:
    """An import in a process group of its own."""
    code = (
        "import sys; from pathlib import Path; from nemotron_recipes.executors.images import catalog\n"
        "from nemotron_recipes.executors.images.enroot import Reference\n"
        "catalog.import_squashfs(Reference('r.io', 'a', '1'), 'sha256:' + 'ab' * 32, 'amd64', Path(sys.argv[1]))"
    )
    assert Reference("r.io", "a", "1").for_pyxis == "r.io#a:1"
    argv = [sys.executable, "-c", code, str(target)]
    return subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, **options)


def test_our_images_install_what_workers_import_at_versions_that_tests_run_on() -> None:
    """The extras of data preparation, its gates and the trl worker, but for torch, which the base image brings."""
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = [Requirement(text) for extra in ("data", "gates", "trl") for text in tree[extra]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    newest = {line.partition("==")[0]: line.partition("==")[2].partition(" ")[0] for line in lines if "==" in line}
    installed = {}
    for file in (image_list.folder() / "trl.Dockerfile", image_list.folder() / "unsloth.Dockerfile"):
        told = [Requirement(text) for text in re.findall(r'"([A-Za-z0-9_-]+[=><][^"]*)"', file.read_text())]
        installed |= {each.name.lower(): each for each in told}
    for requirement in wanted:
        name = requirement.name.lower()
        if name not in ("torch", "nemotron-recipes"):
            assert name in installed, f"{name} is missing in trl.Dockerfile"
            assert installed[name].specifier.contains(newest[name]), f"{installed[name]}: tests run on {newest[name]}"
    backends = {"trl": TRL, "data_prep": DATA_PREP}
    distributions = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    for modules in backends.values():
        for module in modules:
            assert module == "torch" or distributions.get(module, module) in installed, module
    for image in catalog.known_images():  # what the list says of them is what the recipe pins
        if image.recipe and image.versions:
            for name, version in image.versions.items():
                assert installed[name].specifier.contains(str(version))
