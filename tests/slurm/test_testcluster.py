"""The test cluster itself: what Slurm promises holds on it, nodes die as machines do, and nothing stays behind."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import conf, proctree, services
from slurm.releases import Release
from slurm.spec import Spec, load, problems_of_folder
from tests.helpers import images, slurm
from tests.helpers.slurm import Cluster, manage, wait_for

pytestmark = pytest.mark.slurm

OTHER_USER = "nobody"
SLEEP = shutil.which("sleep")  # what srun makes of the word


@pytest.fixture(scope="module")
def plain(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """A second cluster beside the session's: no accounting, no GPU, no namespaces. Its nodes are killed."""
    with slurm.cluster("--nodes=3", "--no-accounting", "--no-namespaces") as found:
        yield found


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a test brings up a cluster by itself; whatever the test does, none is left."""
    slurm.require()
    path = Path(tempfile.mkdtemp(prefix="slurm-"))
    yield path
    manage("down", folder=path, code=None)
    shutil.rmtree(path, ignore_errors=True)
    assert not proctree.naming(str(path))


def test_a_job_of_two_nodes_with_two_tasks_each(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = slurm_cluster.sbatch(
        "srun bash -c 'echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_NTASKS'",
        "--nodes=2",
        "--ntasks-per-node=2",
        cwd=tmp_path,
    )
    assert slurm_cluster.wait(job)["JobState"] == "COMPLETED"
    rows = [line.split() for line in (tmp_path / f"{job}.out").read_text().splitlines()]
    assert sorted(row[0] for row in rows) == ["0", "1", "2", "3"]
    assert sorted(row[1] for row in rows) == ["node1", "node1", "node2", "node2"]
    assert {row[2] for row in rows} == {"4"}


def test_nodes_have_names_and_addresses_where_namespaces_are_allowed(slurm_cluster: Cluster, plain: Cluster) -> None:
    for one in (slurm_cluster, plain):
        spec = load(one.folder)
        names = one.run("srun", "--nodes=2", "hostname").stdout.split()
        assert sorted(names) == (["node1", "node2"] if spec.isolated else [socket.gethostname()] * 2)
        if spec.isolated:
            lines = one.run("srun", "--nodes=2", "getent", "hosts", "node2").stdout.splitlines()
            assert [line.split() for line in lines] == [[spec.node_address(2), "node2"]] * 2
    assert not load(plain.folder).isolated


def test_gpus_are_allotted_and_too_many_refused(slurm_cluster: Cluster) -> None:
    shown = slurm_cluster.run("srun", "--nodes=2", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES").stdout
    assert shown.split() == ["0,1", "0,1"]
    refused = slurm_cluster.run("sbatch", "--gpus-per-node=3", "--wrap=true", code=1)
    assert "Requested node configuration is not available" in refused.stderr


def test_exit_codes_in_sacct(slurm_cluster: Cluster, tmp_path: Path) -> None:
    by_code = slurm_cluster.sbatch("exit 3", cwd=tmp_path)
    by_task = slurm_cluster.sbatch("srun bash -c 'exit $((SLURM_PROCID * 5))'", "--nodes=2", cwd=tmp_path)
    by_signal = slurm_cluster.sbatch("kill -KILL $$", cwd=tmp_path)
    assert slurm_cluster.sacct(by_code, "State", "ExitCode") == ["FAILED", "3:0"]
    assert slurm_cluster.sacct(by_task, "State", "ExitCode") == ["FAILED", "5:0"]
    assert slurm_cluster.sacct(by_signal, "State", "ExitCode") == ["FAILED", "0:9"]


def test_exit_codes_without_accounting(plain: Cluster, tmp_path: Path) -> None:
    job = plain.sbatch("exit 3", cwd=tmp_path)
    ended = plain.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "3:0")
    assert "accounting storage is disabled" in plain.run("sacct", "-j", job, code=1).stderr


def test_two_clusters_at_once_know_nothing_of_each_other(
    slurm_cluster: Cluster, plain: Cluster, tmp_path: Path
) -> None:
    names = {}
    for each in (slurm_cluster, plain):
        names[each] = f"of-{uuid.uuid4().hex}"
        each.sbatch("sleep 300", f"--job-name={names[each]}", cwd=tmp_path)
    for each, name in names.items():
        assert each.run("squeue", "--noheader", "--format=%j").stdout.split() == [name]
        each.run("scancel", f"--name={name}")
        wait_for(lambda each=each: not each.run("squeue", "--noheader").stdout, "the queue to be empty")
    assert set(load(slurm_cluster.folder).ports).isdisjoint(load(plain.folder).ports)


def test_an_account_that_is_not_there_is_refused(slurm_cluster: Cluster) -> None:
    slurm_cluster.run("srun", "--account=lab", "true")
    refused = slurm_cluster.run("sbatch", "--account=other", "--wrap=true", code=1)
    assert "Invalid account" in refused.stderr


def test_scancel_ends_every_task_on_every_node(slurm_cluster: Cluster, tmp_path: Path) -> None:
    mark = _mark()
    # One that ignores SIGTERM, one in a session of its own, one whose parent ended: none may survive.
    script = f"srun bash -c '(setsid sleep {mark} &); trap \"\" TERM; setsid sleep {mark} & sleep {mark}'"
    job = slurm_cluster.sbatch(script, "--nodes=2", cwd=tmp_path)
    wait_for(lambda: len(_sleepers(mark)) == 6, "three sleeping processes on each node")
    slurm_cluster.run("scancel", job)
    assert slurm_cluster.wait(job)["JobState"] == "CANCELLED"
    wait_for(lambda: not _sleepers(mark), "all tasks to be gone")
    assert slurm_cluster.sacct(job, "State")[0].startswith("CANCELLED by")


def test_what_a_step_leaves_behind_ends_with_its_last_task(slurm_cluster: Cluster, tmp_path: Path) -> None:
    mark = _mark()
    task = f"[ $SLURM_PROCID = 1 ] || (setsid sleep {mark} &); until [ -e go ]; do sleep 0.1; done"
    job = slurm_cluster.sbatch(f"srun bash -c '{task}'", "--ntasks=2", cwd=tmp_path)
    (orphan,) = wait_for(lambda: _sleepers(mark), "the process to lose its parent")
    time.sleep(1)  # two looks of the node's guard
    assert _sleepers(mark) == [orphan], "it died while its step had tasks"
    (tmp_path / "go").touch()
    assert slurm_cluster.wait(job)["JobState"] == "COMPLETED"
    wait_for(lambda: not _sleepers(mark), "the process to end")


@pytest.mark.long
def test_a_dead_node_fails_its_jobs_or_has_them_requeued(plain: Cluster, tmp_path: Path) -> None:
    marks = {"--no-requeue": _mark(), "--requeue": _mark()}
    script = "echo restart ${{SLURM_RESTART_COUNT:-0}} >> restarts{flag}; srun sleep {mark}"
    jobs = {
        flag: plain.sbatch(script.format(flag=flag, mark=mark), flag, "--nodes=2", "--nodelist=node[1-2]", cwd=tmp_path)
        for flag, mark in marks.items()
    }
    wait_for(lambda: all(len(_sleepers(mark)) == 2 for mark in marks.values()), "both jobs to run on both nodes")

    manage("kill-node", "2", folder=plain.folder)
    assert all(len(_sleepers(mark)) == 1 for mark in marks.values()), "the dead node's tasks live, or the other's died"
    assert _shown(plain, "node2").split()[:3] == ["node2", "dead", "0"]
    assert plain.wait(jobs["--no-requeue"])["JobState"] == "NODE_FAIL"
    wait_for(lambda: plain.job(jobs["--requeue"])["Restarts"] == "1", "the other job to be requeued")
    wait_for(lambda: not _sleepers(marks["--no-requeue"]), "the failed job's tasks to be gone")

    manage("start-node", "2", folder=plain.folder)
    plain.wait(jobs["--requeue"], "RUNNING")
    wait_for(lambda: len(_sleepers(marks["--requeue"])) == 2, "the requeued job to run on both nodes")
    assert (tmp_path / "restarts--requeue").read_text().split("\n") == ["restart 0", "restart 1", ""]
    assert (tmp_path / "restarts--no-requeue").read_text() == "restart 0\n"
    plain.run("scancel", jobs["--requeue"])


def test_slurmctld_is_told_of_a_dead_node_on_request(plain: Cluster, tmp_path: Path) -> None:
    job = plain.sbatch("sleep 300", "--no-requeue", "--nodelist=node3", cwd=tmp_path)
    plain.wait(job, "RUNNING")
    manage("kill-node", "node3", "--noticed", folder=plain.folder)
    assert plain.wait(job)["JobState"] == "NODE_FAIL"
    manage("start-node", "node3", folder=plain.folder)


def test_a_job_outlives_a_killed_slurmctld(plain: Cluster, tmp_path: Path) -> None:
    job = plain.sbatch("until [ -e go ]; do sleep 0.1; done; exit 7", cwd=tmp_path)
    plain.wait(job, "RUNNING")
    saved, running = plain.folder / "state" / "job_state", time.time()
    plain.run("scontrol", "update", f"JobId={job}", "Comment=mine")  # its start may have been saved by now
    wait_for(lambda: saved.exists() and saved.stat().st_mtime > running, "slurmctld to save its state")
    manage("kill-daemon", "slurmctld", folder=plain.folder)
    assert plain.run("scontrol", "ping", code=None).returncode != 0
    manage("start-daemon", "slurmctld", folder=plain.folder)
    assert plain.job(job)["JobState"] == "RUNNING"
    (tmp_path / "go").touch()
    assert plain.wait(job)["ExitCode"] == "7:0"


def test_down_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    manage("up", "--nodes=2", folder=folder)
    spec, mark, one = load(folder), _mark(), Cluster(folder)
    one.sbatch(f"srun bash -c 'setsid sleep {mark} & sleep {mark}'", "--nodes=2", cwd=tmp_path)
    wait_for(lambda: len(_sleepers(mark)) == 4, "the job to run")
    manage("down", folder=folder)
    _assert_nothing_is_left(spec, mark)
    assert f"no test cluster in {folder}" in manage("down", folder=folder).stdout


def test_a_killed_keeper_takes_the_cluster_along(folder: Path, tmp_path: Path) -> None:
    manage("up", "--nodes=2", "--no-accounting", folder=folder)
    spec, mark, one = load(folder), _mark(), Cluster(folder)
    one.sbatch(f"srun bash -c 'setsid sleep {mark} & wait'", "--nodes=2", cwd=tmp_path)
    wait_for(lambda: len(_sleepers(mark)) == 2, "the job to run")
    keeper = int((spec.files.run / "keeper.pid").read_text())
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: not proctree.naming(str(folder)), "every process to be gone")
    assert "is gone" in manage("status", folder=folder, code=2).stderr
    manage("down", folder=folder)
    _assert_nothing_is_left(spec, mark)


def test_a_cluster_ends_with_the_process_that_it_was_made_for(folder: Path) -> None:
    with subprocess.Popen(["sleep", "300"]) as process:
        manage("up", "--nodes=1", "--no-accounting", f"--while={process.pid}", folder=folder)
        spec = load(folder)
        process.kill()
    wait_for(lambda: not folder.exists(), "the cluster to end")
    _assert_nothing_is_left(spec, _mark())


def test_an_up_that_fails_says_why_and_leaves_nothing(folder: Path) -> None:
    failed = manage("up", "--no-accounting", "--set=SelectType=select/nonsense", folder=folder, code=1)
    assert "error: slurmctld ended at once" in failed.stderr
    assert "select/nonsense" in failed.stderr and "Traceback" not in failed.stderr
    assert not folder.exists() and not proctree.naming(str(folder))


def test_ctrl_c_during_up_leaves_nothing(folder: Path) -> None:
    argv = [sys.executable, str(slurm.PROGRAM), "up", f"--dir={folder}"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (folder / "private" / "db").exists(), "the database to be made")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    assert (process.returncode, told) == (130, "stopped\n")
    assert not folder.exists() and not proctree.naming(str(folder))


def test_a_second_up_in_one_folder_is_refused(plain: Cluster) -> None:
    refused = manage("up", folder=plain.folder, code=2)
    assert f"a test cluster is already in {plain.folder}" in refused.stderr
    plain.run("scontrol", "ping")


def test_a_normal_user_needs_no_root() -> None:
    """The user nobody, who owns nothing, where this is root; else whoever this is."""
    slurm.require()
    user = pwd.getpwnam(OTHER_USER) if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    assert python, "no interpreter that other users may run"
    with tempfile.TemporaryDirectory(prefix="slurm-", dir=_open_to_all()) as home:
        os.chmod(home, 0o755)
        package = Path(home, "nemotron_recipes")
        package.mkdir()
        for name in ("__init__.py", "errors.py", "fsio.py"):
            shutil.copy(slurm.PROGRAM.parents[1] / "nemotron_recipes" / name, package)
        shutil.copytree(slurm.PROGRAM.parent, Path(home, "slurm"))
        own = Path(home, "own")
        own.mkdir()
        os.chown(own, user.pw_uid, user.pw_gid)
        one = Cluster(own / "c")
        image = Path(home, "image.sqsh")
        images.make_image(image, images.make_shell_tree(Path(home, "tree")), {}, {"/opt/image": "of the image\n"})

        def as_user(*argv: str) -> str:
            change = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
            return one.run(*argv, cwd=own, env={**one.env, "TMPDIR": str(own)}, **change).stdout

        program = [python, f"{home}/slurm/testcluster"]
        try:
            flags = ("--nodes=2", "--gpus-per-node=1", "--pyxis-standin", f"--while={os.getpid()}")
            as_user(*program, "up", *flags, f"--dir={one.folder}")
            rows = as_user("srun", "--nodes=2", "--ntasks-per-node=2", "bash", "-c", "echo $SLURM_PROCID $(id -un)")
            assert sorted(rows.splitlines()) == [f"{rank} {user.pw_name}" for rank in range(4)]
            container = (
                f"--container-image={image}",
                f"--container-mounts={home}:/opt/here:ro",
                "--container-workdir=/opt",
            )
            rows = as_user("srun", *container, "sh", "-c", "read line < image; echo $line; (: > here/own/x) || echo no")
            assert rows.splitlines() == ["of the image", "no"]
            job = as_user("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 3").strip()
            assert one.wait(job)["ExitCode"] == "3:0"
        finally:
            as_user(*program, "down", f"--dir={one.folder}")
        assert not proctree.naming(home)


def _open_to_all() -> str:
    """A temporary folder that another user may enter; $TMPDIR may lie in somebody's own."""
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if all(part.stat().st_mode & 0o001 for part in (Path(folder), *Path(folder).parents)):
            return folder
    raise AssertionError("no temporary folder that other users may enter")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(services, "SEARCH", str(tmp_path))
    (problem,) = services.missing_packages(accounting=True)
    assert "mariadb-server-core, munge, slurm-client, slurmctld, slurmd, slurmdbd" in problem.what
    assert problem.fix == "`make test-system` as root"
    for name in services.PACKAGES:
        (tmp_path / name).touch(mode=0o755)
    assert not services.missing_packages(accounting=False)
    (problem,) = services.missing_packages(accounting=True)
    assert problem.fix.endswith("--no-accounting")


def test_settings_replace_parameters_whatever_their_case() -> None:
    settings = {"slurmdtimeout": "4"}
    ports, release = (1, 2, 3, 4), Release("22.05.8")
    spec = Spec("/c", "me", "box", 2, 8, 1000, 0, False, (), True, "127.9.9", ports, release, settings=settings)
    lines = conf.slurm_conf(spec).splitlines()
    assert [line for line in lines if line.lower().startswith("slurmdtimeout=")] == ["slurmdtimeout=4"]
    assert [line.split()[2] for line in lines if line.startswith("NodeName=")] == [
        "NodeAddr=127.9.9.1",
        "NodeAddr=127.9.9.2",
    ]


def test_a_folder_that_cannot_hold_a_cluster_is_refused(tmp_path: Path) -> None:
    assert problems_of_folder(Path("/tmp/" + "x" * 80))[0].what.endswith("as Slurm's sockets lie below it")
    (tmp_path / "mine").touch()
    assert "is not an empty folder" in problems_of_folder(tmp_path)[0].what
    assert "can't hold in a path" in problems_of_folder(Path("/tmp/a b"))[0].what


def _shown(one: Cluster, daemon: str) -> str:
    """That daemon's line of `status`."""
    (line,) = (line for line in manage("status", folder=one.folder).stdout.splitlines() if line.startswith(daemon))
    return line


def _mark() -> str:
    """A duration that no other process sleeps for."""
    return f"{600 + uuid.uuid4().int % 300}.{uuid.uuid4().int % 10**9}"


def _sleepers(mark: str) -> list[int]:
    """The processes `sleep MARK`: not the shells, nor the srun, that have it in their command lines."""
    return [pid for pid, line in proctree.naming(mark).items() if line in (f"sleep {mark}", f"{SLEEP} {mark}")]


def _assert_nothing_is_left(spec: Spec, mark: str) -> None:
    assert not Path(spec.folder).exists()
    assert not proctree.naming(spec.folder) and not _sleepers(mark)
    assert spec.folder not in Path("/proc/self/mounts").read_text()
    for port in spec.ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections linger in the kernel
            probe.bind(("", port))
            probe.listen()
