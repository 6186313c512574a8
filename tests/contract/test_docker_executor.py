"""The docker executor beyond the contract, on real daemons: what a container gets, and daemons and drivers that go."""

from __future__ import annotations

import csv
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nemotron_recipes.errors import UserError
from nemotron_recipes.executors.docker import files, preflight
from nemotron_recipes.executors.docker.control import Docker, Unreachable
from nemotron_recipes.executors.docker.executor import DockerExecutor
from nemotron_recipes.executors.docker.profile import DockerProfile
from nemotron_recipes.executors.docker.render import container_name, profile_of
from nemotron_recipes.executors.local import process_tree
from nemotron_recipes.rundir import RunDir
from nemotron_recipes.spec import Artifact, JobHandle, StagePlan
from tests.helpers import docker
from tests.helpers.executor_harness import events, placement, wait_for, wait_until_over
from tests.helpers.plans import plan_of, probe_stage, submit

EXECUTOR = DockerExecutor()
pytestmark = pytest.mark.docker


def stage_of(name: str = "first", fields: dict[str, Any] | None = None, **orders: Any) -> StagePlan:
    return probe_stage(name, placement=placement(EXECUTOR, **(fields or {})), **orders)


def wait_for_probe(run_dir: Path, stage: str = "first") -> None:
    wait_for((RunDir(run_dir).stage(stage).path / "received-0.json").exists)


def end_probe(daemon: docker.Daemon, handle: JobHandle) -> None:
    """Kill it inside its container, unseen by docker."""
    received = json.loads((Path(handle.run_dir) / "first" / "received-0.json").read_text())
    container = events(handle, "stage-started")[-1]["container"]
    daemon.docker("exec", container, "sh", "-c", f"kill -KILL {received['pid']}")


@pytest.fixture
def daemon(docker_daemon: docker.Daemon, monkeypatch: pytest.MonkeyPatch) -> docker.Daemon:
    monkeypatch.setenv("DOCKER_HOST", docker_daemon.host)
    return docker_daemon


@pytest.fixture
def own_daemon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[docker.Daemon]:
    """One that may be taken down; the parameter holds flags."""
    docker.require()
    with docker.daemon(*getattr(request, "param", ())) as made:
        monkeypatch.setenv("DOCKER_HOST", made.host)
        yield made


def test_a_container_gets_what_the_profile_says_and_no_secret_shows(
    daemon: docker.Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "s3cr3t-do-not-show-me"
    monkeypatch.setenv("A_TOKEN", secret)
    data, elsewhere = tmp_path / "my data, v1:2", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    (data / "rows.jsonl").write_text("{}\n")
    fields = {"secrets": ["A_TOKEN"], "mounts": [*docker.mounts(), f"{elsewhere}:/else:ro"], "options": ["--cpus=1.5"]}
    pattern = Artifact("path", "data", uri=f"{data}/*.jsonl")
    stage = replace(stage_of(fields=fields, sleep=120), inputs={"data.path": pattern})
    plan = plan_of(tmp_path / "runs" / "run", stage)
    handle, rendered = submit(EXECUTOR, plan)
    wait_for_probe(tmp_path / "runs" / "run")
    (told,) = json.loads(daemon.docker("container", "inspect", container_name(plan, plan.stages[0])))
    file = files.secrets(RunDir(Path(plan.run_dir)))
    assert file.stat().st_mode & 0o777 == 0o600
    assert secret in file.read_text()
    EXECUTOR.cancel(handle)
    assert not file.exists()
    assert secret not in json.dumps(told) + repr(rendered)
    (stage_shown,) = rendered.stages
    as_shown(stage_shown.argv, told)
    host = told["HostConfig"]
    assert told["Config"]["User"] == f"{os.getuid()}:{os.getgid()}"
    assert host["IpcMode"] == "host"
    assert host["Ulimits"] == [{"Name": "stack", "Hard": 67108864, "Soft": 67108864}]
    assert host["NanoCpus"] == 1_500_000_000
    assert not host["DeviceRequests"]
    mounted = {mount["Destination"]: (mount["Source"], mount["RW"]) for mount in told["Mounts"]}
    assert mounted[plan.run_dir] == (plan.run_dir, True)
    assert mounted[plan.store] == (plan.store, True)
    assert mounted[str(data)] == (str(data), False), "an input is there, and can't be changed"
    assert mounted["/else"] == (str(elsewhere), False)
    assert daemon.docker("ps", "--all", "--quiet", "--filter", f"label=nemotron.run={plan.id}") == ""


def as_shown(argv: tuple[str, ...], told: dict[str, Any]) -> None:
    """The container that docker made is what the line of the dry run says, word for word."""
    at = argv.index(docker.IMAGE)
    assert argv[:6] == ("docker", "run", "--detach", "--pull", "never", "--name")
    flags: dict[str, list[str]] = {}
    words = iter(argv[5:at])
    for flag in words:
        name, _, value = flag.partition("=")
        flags.setdefault(name, []).append(value or next(words))
    config, host = told["Config"], told["HostConfig"]
    assert (told["Name"], config["Image"], config["Cmd"]) == (f"/{flags['--name'][0]}", argv[at], [*argv[at + 1 :]])
    assert (config["User"], config["WorkingDir"]) == (flags["--user"][0], flags["--workdir"][0])
    assert (host["IpcMode"], host["NetworkMode"]) == (flags["--ipc"][0], flags["--network"][0])
    assert dict(label.split("=", 1) for label in flags["--label"]).items() <= config["Labels"].items()
    given = [text for text in flags["--env"] if "=" in text]
    assert set(given) <= set(config["Env"])
    assert {text.partition("=")[0] for text in config["Env"]} - {text.partition("=")[0] for text in flags["--env"]} == {
        *("PATH", "PYTHONPATH", "LC_ALL")  # the image's own
    }
    mounts = {(mount["Source"], mount["Destination"], mount["RW"]) for mount in told["Mounts"]}
    wanted = [dict(part.partition("=")[::2] for part in next(csv.reader([line]))) for line in flags["--mount"]]
    assert mounts == {(each["source"], each["target"], "readonly" not in each) for each in wanted}
    assert {*flags} == {
        *("--name", "--label", "--user", "--workdir", "--ipc", "--ulimit", "--network", "--mount", "--env", "--cpus")
    }


def test_files_belong_to_the_user(daemon: docker.Daemon, tmp_path: Path) -> None:
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of(fields={"user": f"{os.getuid()}:12345"})))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}
    made = (tmp_path / "run" / "first" / "received-0.json").stat()
    assert (made.st_uid, made.st_gid) == (os.getuid(), 12345)


def test_a_stage_gets_its_grace_and_a_shell(daemon: docker.Daemon, tmp_path: Path) -> None:
    stage = stage_of(fields={"grace_seconds": 60.0}, sleep=120)  # the launcher writes its report, on a slow disk too
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
    wait_for_probe(tmp_path / "run")
    shell = EXECUTOR.shell(handle, "first", ["sh", "-c", "echo $NEMOTRON_RUN_ID; exit 5"])
    done = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (5, f"{handle.run}\n"), done.stderr
    EXECUTOR.cancel(handle)
    with pytest.raises(UserError, match="no container that runs"):
        EXECUTOR.shell(handle, "first", ["sh"])
    assert [e["event"] for e in events(handle)] == ["driver-started", "stage-started", "stage-exited", "cancelled"]
    assert events(handle, "stage-exited")[0]["exit_code"] == 128 + signal.SIGTERM


def test_what_the_image_says_before_the_launcher_runs_is_kept(daemon: docker.Daemon, tmp_path: Path) -> None:
    daemon.import_image("nemotron-test:broken", 'ENTRYPOINT ["/usr/bin/python3", "-c", "raise SystemExit(\'no GPU\')"]')
    handle, _ = submit(
        EXECUTOR, plan_of(tmp_path / "run", stage_of(fields={"container_image": "nemotron-test:broken"}))
    )
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert events(handle, "stage-exited")[0]["exit_code"] == 1
    assert "no GPU" in RunDir(tmp_path / "run").stage("first").launcher_log(1).read_text()


def test_a_container_that_outgrows_its_memory_says_so(daemon: docker.Daemon, tmp_path: Path) -> None:
    stage = stage_of(fields={"options": ["--memory=128m", "--memory-swap=128m"]})
    stage = replace(stage, launch=replace(stage.launch, module="tests.helpers.memory_eater"))
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    end = events(handle, "finished")[0]
    assert (events(handle, "stage-exited")[0]["exit_code"], end["scheduler"]) == (137, "OUT_OF_MEMORY")
    assert "docker says OOMKilled" in end["cause"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"python": "/no/such/python"}, "/no/such/python"),
        ({"mounts": ["/no/such/folder:/x"]}, "/no/such/folder"),
        ({"gpus": "all"}, "NVIDIA container toolkit"),
        ({"options": ["--no-such-flag"]}, "no-such-flag"),
    ],
)
def test_docker_says_why_a_container_can_not_start(
    daemon: docker.Daemon, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of(fields=fields)))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert told in events(handle)[-1]["cause"]
    assert events(handle)[-1]["state"] == "failed"
    assert daemon.docker("ps", "--all", "--quiet", "--filter", f"label=nemotron.run={handle.run}") == ""


def test_a_container_outlives_its_driver_and_its_end_is_found(
    daemon: docker.Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path / "run", stage_of(sleep=120))
    handle, rendered = submit(EXECUTOR, plan)
    wait_for_probe(tmp_path / "run")
    os.kill(handle.native["pid"], signal.SIGKILL)
    wait_for(lambda: process_tree.find(handle.native["pid"], handle.native["created"], handle.run) is None)
    assert EXECUTOR.liveness(handle) == "running"
    with pytest.raises(UserError, match="is running already"):
        EXECUTOR.submit(plan, rendered)
    end_probe(daemon, handle)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")  # of a later reader: the handle knows better
    wait_for(lambda: process_tree.members(handle.run) == [], 130)
    wait_for(lambda: EXECUTOR.liveness(handle) == "ended")
    assert EXECUTOR.settle(handle)
    assert events(handle, "stage-exited")[0]["exit_code"] == 137
    assert "exit code 137" in events(handle, "finished")[0]["cause"]
    assert EXECUTOR.settle(handle) == []
    assert EXECUTOR.liveness(handle) == "ended"


@pytest.mark.parametrize("own_daemon", [("--live-restore",)], indirect=True)
def test_a_container_outlives_its_daemon(own_daemon: docker.Daemon, tmp_path: Path) -> None:
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of(sleep=120)))
    wait_for_probe(tmp_path / "run")
    own_daemon.stop(signal.SIGKILL)
    assert EXECUTOR.liveness(handle) == "running"
    own_daemon.start()
    assert EXECUTOR.liveness(handle) == "running"
    end_probe(own_daemon, handle)
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert events(handle, "stage-exited")[0]["exit_code"] == 137
    assert events(handle, "requeued") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_goes_on_when_its_daemon_has_ended_it(own_daemon: docker.Daemon, tmp_path: Path, number: int) -> None:
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage_of(sleep=120, attempts=1)))
    wait_for_probe(tmp_path / "run")
    own_daemon.stop(number)
    assert EXECUTOR.liveness(handle) == "running"
    own_daemon.start()
    assert wait_until_over(EXECUTOR, handle) == "ended"
    (again,) = events(handle, "requeued")
    assert (again["attempt"], again["cause"], again["step"], again["requeues"]) == (1, "docker-daemon", None, 1)
    assert [e["attempt"] for e in events(handle, "stage-started")] == [1, 2]
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}


def test_what_the_daemon_can_not_do_is_refused_before_anything_starts(
    daemon: docker.Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = daemon.docker("image", "inspect", "--format", "{{.Architecture}}", docker.IMAGE).strip()
    other = "arm64" if here == "amd64" else "amd64"
    daemon.load_foreign_image("nemotron-test:other", other)
    refused(tmp_path / "r1", {"container_image": "nemotron-test:other"}, f"is for {other}")
    refused(
        *(tmp_path / "r2", {"container_image": "no.such/image:1"}),
        *("not on this machine", "nemotron images import no.such/image:1 --docker"),
    )
    refused(tmp_path / "r3", {"docker_host": f"unix://{tmp_path}/nobody"}, "can't be used", "start the daemon")
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
    refused(tmp_path / "r4", {}, "can't be mounted", "start the run on that machine")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DOCKER_HOST")
    refused(tmp_path / "r5", {}, "no docker command", "install docker")


def test_a_daemon_that_is_back_a_moment_later_was_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in docker's place says what docker 20.10 said between the two; any other question is answered."""
    fake_docker = tmp_path / "bin" / "docker"
    fake_docker.parent.mkdir()
    away = "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?"
    fake_docker.write_text(f"#!/bin/sh\n[ $1 = version ] && exit 0\necho '{away}' >&2\nexit 1\n")
    fake_docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake_docker.parent), prepend=os.pathsep)
    with pytest.raises(Unreachable, match="Is the docker daemon running"):
        Docker("unix:///x").container("c")


def test_podman_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its service, faked by a command that says what docker 28 said of Podman 4.3.1."""
    told = json.dumps({"Version": "4.3.1", "Components": [{"Name": "Podman Engine", "Version": "4.3.1"}]})
    fake_docker = tmp_path / "bin" / "docker"
    fake_docker.parent.mkdir()
    fake_docker.write_text(f"#!/bin/sh\necho '{told}'\n")
    fake_docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake_docker.parent), prepend=os.pathsep)
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/user/1000/podman/podman.sock")
    refused(tmp_path / "run", {}, "is Podman's socket", "use docker's own daemon")


def test_what_an_image_can_not_import_is_told_before_anything_starts(daemon: docker.Daemon, tmp_path: Path) -> None:
    """One container for all stages of the image; both problems at once."""
    stages = [
        replace(stage, launch=replace(stage.launch, imports=imports))
        for stage, imports in (
            (stage_of("first"), ("json", "no_such_package")),
            (stage_of("second"), ("json", "this.x")),
        )
    ]
    problems = EXECUTOR.preflight(plan_of(tmp_path / "run", *stages))
    assert len(problems) == 2
    assert f"no_such_package, which image {docker.IMAGE} (Python {platform.python_version()})" in problems[0].what
    assert "ModuleNotFoundError" in problems[1].what
    assert EXECUTOR.preflight(plan_of(tmp_path / "run", replace(stages[0], launch=stage_of().launch))) == []
    without = replace(stages[0], placement=placement(EXECUTOR, python="/no/such/python"))
    (problem,) = EXECUTOR.preflight(plan_of(tmp_path / "run", without))
    assert "/no/such/python" in problem.what
    assert not (tmp_path / "run").exists()
    assert daemon.docker("ps", "--all", "--quiet", "--filter", "name=nemotron-trial") == ""


def test_code_of_completions_is_closed_in_a_container_as_well(daemon: docker.Daemon) -> None:
    """With docker's own filter of system calls, as any user."""
    mounts = [word for mount in docker.mounts() for word in ("--volume", mount)]
    script = "from nemotron_recipes.worker.trl.sandbox import walls; print(walls())"
    argv = (
        "run",
        "--rm",
        "--network",
        "none",
        "--user",
        "1234:1234",
        *mounts,
        docker.IMAGE,
        sys.executable,
        "-c",
        script,
    )
    said = daemon.docker(*argv)
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 12):
        assert "files beside its own and Python's, the network, other processes" in said
        assert "warning" not in said


def refused(run_dir: Path, fields: dict[str, Any], *told: str) -> None:
    problems = EXECUTOR.preflight(plan_of(run_dir, stage_of(fields=fields)))
    said = "\n".join(str(problem) for problem in problems)
    assert all(words in said for words in told), said
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"env": {"HOME": "/x"}}, "HOME"),
        ({"mounts": ["relative:/x"]}, "no mount"),
        ({"mounts": ["/a:/b:rw,z"]}, "no mount"),
        ({"user": "me"}, "no user"),
        ({"options": ["--rm"]}, "--rm"),
        ({"options": ["-v=/:/host"]}, "-v"),
        ({"docker_host": "ssh://spark2"}, "not on this machine"),
        ({"container_image": "--privileged"}, "no reference"),
    ],
)
def test_check_refuses(fields: dict[str, Any], told: str) -> None:
    (problem,) = EXECUTOR.check(replace(stage_of(fields=fields), directory="/run/first"))
    assert told in problem.what
    assert problem.where
    assert problem.fix


@pytest.mark.parametrize("fields", [{"nodes": 2}, {"gpus": "some"}, {"container_image": ""}, {"nproc": 2}])
def test_a_profile_is_closed_and_strict(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DockerProfile(**{"container_image": "x", **fields})


def test_gpus_are_asked_for_by_name(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", stage_of(fields={"gpus": ["0", "3"]}))
    (stage,) = EXECUTOR.render(plan).stages
    assert stage.argv[stage.argv.index("--gpus") + 1] == '"device=0,3"', "docker reads the value as a line of CSV"


@pytest.mark.parametrize(
    ("option", "flag"), [("name=userns", "--userns=host"), ("name=selinux", "--security-opt=label=disable")]
)
def test_a_daemon_whose_containers_could_not_write_is_refused(option: str, flag: str) -> None:
    info = {"SecurityOptions": ["name=seccomp,profile=default", option]}
    stage = replace(stage_of(), directory="/run/first")
    (problem,) = preflight._guarded_files(info, profile_of(stage), stage)
    assert problem.refuses and flag in problem.fix
    told = stage_of(fields={"options": [flag]})
    assert [*preflight._guarded_files(info, profile_of(told), told)] == []
