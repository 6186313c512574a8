"""The Slurm executor on a real Slurm. What every executor must do stands in tests/contract; here is the rest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts.causes import diagnose
from nemotron_recipes.artifacts.records import RunView, load_run
from nemotron_recipes.errors import UserError
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.executors.slurm.meeting import hold_port
from nemotron_recipes.rundir import RunDir, StageDir, read_json
from nemotron_recipes.spec import JobHandle
from tests.helpers import slurm
from tests.helpers.executor_harness import events, placement, wait_for, wait_until_over
from tests.helpers.plans import ROOT, plan_of, probe_stage, submit, write_run
from tests.helpers.probe import digest

pytestmark = pytest.mark.slurm

EXECUTOR = SlurmExecutor()
SECRET = "s3cr3t-that-nobody-may-read"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def cluster(slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    """The session's cluster, for this process as well."""
    return _use(slurm_cluster, monkeypatch)


def test_sbatch_receives_the_bytes_of_the_dry_run(
    cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = shutil.which("sbatch")
    recorder = tmp_path / "bin" / "sbatch"
    recorder.parent.mkdir()
    recorder.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, sys\n"
        f"with open({str(tmp_path / 'received.jsonl')!r}, 'a') as log:\n"
        "    text = pathlib.Path(sys.argv[-1]).read_bytes().decode()\n"
        "    log.write(json.dumps({'argv': sys.argv[1:], 'script': text, 'stdin': sys.stdin.read()}) + '\\n')\n"
        f"os.execv({sbatch!r}, ['sbatch', *sys.argv[1:]])\n"
    )
    recorder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{recorder.parent}:{os.environ['PATH']}")
    plan = plan_of(
        tmp_path / "out put" / "it's $HOME",
        probe_stage("first", placement=placement(EXECUTOR, comment="it's $(hostname)")),
        probe_stage("second", placement=placement(EXECUTOR, nodes=2), launcher="torchrun"),
    )
    shown = EXECUTOR.render(plan)
    handle, _ = submit(EXECUTOR, plan)
    received = [json.loads(line) for line in (tmp_path / "received.jsonl").read_text().splitlines()]
    assert [entry["script"] for entry in received] == [
        next(text for path, text in stage.files.items() if path.endswith("sbatch.sh")) for stage in shown.stages
    ]
    ids = [*handle.native["jobs"].values()]
    known = {f"<token of {stage}>": token for stage, token in handle.native["tokens"].items()}
    known["<job of first>"] = ids[0]
    told = [[_filled(word, known) for word in command] for command in shown.submit]
    assert [["sbatch", *entry["argv"]] for entry in received] == told
    assert {entry["stdin"] for entry in received} == {""}
    assert cluster.job(ids[0])["Comment"].startswith("it's")
    kept = cluster.run("scontrol", "write", "batch_script", ids[1], "-").stdout
    assert kept.rstrip("\n") == received[1]["script"].rstrip("\n")
    EXECUTOR.cancel(handle)


def _filled(word: str, known: dict[str, str]) -> str:
    for symbol, value in known.items():
        word = word.replace(symbol, value)
    return word


@pytest.mark.e2e
def test_two_nodes_of_two_processes(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, nodes=2, nproc_per_node=2, gpus_per_node=2)
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place, launcher="torchrun")))
    assert wait_until_over(EXECUTOR, handle, 120) == "ended"
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}
    (started,) = events(handle, "stage-started")
    assert len(started["hosts"]) == 2
    seen = [_received(tmp_path, "first", rank)["env"] for rank in range(4)]
    for rank, env in enumerate(seen):
        node, local = divmod(rank, 2)
        assert env["RANK"] == digest(str(rank))
        assert env["WORLD_SIZE"] == digest("4")
        assert env["LOCAL_RANK"] == digest(str(local))
        assert env["SLURMD_NODENAME"] == digest(started["hosts"][node])
        assert env["MASTER_ADDR"] == digest(started["hosts"][0])
    assert len({env["MASTER_PORT"] for env in seen}) == 1


@pytest.mark.e2e
def test_a_rank_that_fails_on_another_node_is_named(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, nodes=2, nproc_per_node=2)
    stage = probe_stage("first", placement=place, launcher="torchrun", failing_rank="3", exit=7, record=None)
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
    assert wait_until_over(EXECUTOR, handle, 120) == "ended"
    view = _settled(handle)
    assert view.state == "failed"
    assert "rank 3 ended with exit code 7" in view.explanation or "rank 3" in str(events(handle, "finished"))
    (finished,) = events(handle, "finished")
    assert "rank 3 ended with exit code 7" in finished["cause"]


@pytest.mark.e2e
def test_two_runs_at_once_on_the_same_nodes(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, nodes=2, srun_args=["--overlap"])
    handles = []
    for name in ("run", "other"):
        stage = probe_stage("first", placement=place, launcher="torchrun", sleep=5)
        handles.append(submit(EXECUTOR, plan_of(tmp_path / name, stage))[0])
    assert [wait_until_over(EXECUTOR, handle, 120) for handle in handles] == ["ended", "ended"]
    for handle in handles:
        assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}
    starts = [events(handle, "stage-started")[0]["hosts"] for handle in handles]
    assert starts[0] == starts[1], "they were to share their nodes"
    ports = {
        read_json(tmp_path / name / "first" / "received-0.json")["env"]["MASTER_PORT"]  # type: ignore[index]
        for name in ("run", "other")
    }
    assert len(ports) == 2


def test_gpus_that_were_not_given_are_named(cluster: slurm.Cluster, tmp_path: Path) -> None:
    if cluster.release < (21, 8):
        pytest.skip("this Slurm gives a step all GPUs of its job, whatever it asks for")
    place = placement(EXECUTOR, gpus_per_node=2, srun_args=["--gpus-per-node=1"])
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place)))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    (finished,) = events(handle, "finished")
    assert "the plan has 2 GPU(s) per node, but node" in finished["cause"]


def test_a_step_on_other_nodes_than_planned_is_refused(cluster: slurm.Cluster, tmp_path: Path) -> None:
    stage = probe_stage("first", placement=placement(EXECUTOR, nodes=2, srun_args=["--nodes=1", "--ntasks=1"]))
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert "srun started 1" in events(handle, "finished")[0]["cause"]
    assert not _received(tmp_path, "first")


@pytest.mark.e2e
def test_a_port_that_is_taken_is_passed_over(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """The nodes of the test cluster share this machine's ports; whoever holds the job's port here holds it there."""
    place = placement(EXECUTOR, nodes=2, additional_parameters={"hold": True})
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place, launcher="torchrun")))
    job = handle.native["jobs"]["first"]
    held, port = hold_port(StageDir(tmp_path / "elsewhere"), 1, job)
    with held:
        cluster.run("scontrol", "release", job)
        assert wait_until_over(EXECUTOR, handle, 120) == "ended"
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}
    met = {_received(tmp_path, "first", rank)["env"]["MASTER_PORT"] for rank in (0, 1)}
    assert len(met) == 1
    assert met != {digest(str(port))}


def test_a_pending_job_never_sees_later_edits(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """A checkout of its own, edited while its job is held: what runs is what was submitted."""
    checkout = tmp_path / "checkout"
    for name in ("nemotron_recipes", "conf"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    module = checkout / "nemotron_recipes" / "worker" / "data_prep.py"
    module.write_text(module.read_text() + "\nprint('as it was submitted')\n")
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\naccount = "lab"\ntime = "5"\n')
    words = ("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40", "--batch", "lab", "--json")
    told = json.loads(_nemotron(tmp_path, *words, "run.additional_parameters={hold: true}", source=checkout).stdout)
    module.write_text("raise SystemExit('edited later')\n")
    shutil.rmtree(checkout / "nemotron_recipes" / "data")
    cluster.run("scontrol", "release", told["native"]["jobs"]["data-prep-sft"])
    followed = _nemotron(tmp_path, "runs", "logs", "-f", told["run"])
    assert "as it was submitted" in followed.stdout
    assert "succeeded" in followed.stdout


def test_secrets_are_nowhere(cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Declared, and taken for one by its name. OPEN_VALUE shows that the search finds what is there."""
    monkeypatch.setenv("MY_LICENCE", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET + "-too")
    monkeypatch.setenv("OPEN_VALUE", "an-open-value")
    place = placement(EXECUTOR, secrets=["MY_LICENCE"], env={"PLAIN": "a-plain-value"})
    handle, rendered = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place, sleep=4)))
    wait_for(lambda: _received(tmp_path, "first"))
    env = _received(tmp_path, "first")["env"]
    assert (env["MY_LICENCE"], env["WANDB_API_KEY"]) == (digest(SECRET), digest(SECRET + "-too"))
    file = tmp_path / "run" / "secrets.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    job = handle.native["jobs"]["first"]
    places = {
        "scontrol": cluster.run("scontrol", "show", "job", "--details", job).stdout,
        "script": cluster.run("scontrol", "write", "batch_script", job, "-").stdout,
        "plan": repr(rendered),
        "processes": "".join(_read(path) for path in Path("/proc").glob("[0-9]*/cmdline")),
        "slurmctld": "".join(_read(path) for path in (cluster.folder / "state").rglob("*") if path.is_file()),
        "spool": "".join(_read(path) for path in (cluster.folder / "spool").rglob("*") if path.is_file()),
    }
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert not file.exists(), "it goes with the run's end"
    places["files"] = "".join(_read(path) for path in tmp_path.rglob("*") if path.is_file())
    cluster.sacct(job, "State")
    if cluster.release >= (21, 8):  # the accounting keeps them from there on
        # slurmctld sends the environment to slurmdbd when it comes to it
        wait_for(lambda: "an-open-value" in cluster.run("sacct", "-j", job, "--env-vars").stdout)
        places["sacct env"] = cluster.run("sacct", "-j", job, "--env-vars").stdout
        places["sacct script"] = cluster.run("sacct", "-j", job, "--batch-script").stdout
    assert {name for name, text in places.items() if SECRET in text} == set()
    found = {name for name, text in places.items() if "an-open-value" in text}
    assert "slurmctld" in found, "where the planted open value lies, a secret would be found"
    assert "a-plain-value" in places["files"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"partition": "no-such"}, "partition"),
        ({"account": "no-such"}, "account"),
        ({"time": "100-00:00:00"}, "time"),
        ({"time": "next tuesday"}, "time"),
        ({"gpus_per_node": 64}, "node configuration"),
        ({"nodes": 99}, "node"),
        ({"additional_parameters": {"no-such-flag": "1"}}, "no-such-flag"),
    ],
)
def test_what_sbatch_refuses_is_said_in_its_words(
    cluster: slurm.Cluster, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    if "nodes" in fields and cluster.release < (21, 8):
        pytest.skip("this Slurm takes it where EnforcePartLimits is not set: the preflight alone refuses it")
    if fields.get("time") == "100-00:00:00" and cluster.release >= (24, 11):
        pytest.skip("this Slurm does not say so while a job waits for another one: the preflight alone refuses it")
    first = probe_stage("first", placement=placement(EXECUTOR, additional_parameters={"hold": True}))
    plan = plan_of(tmp_path / "run", first, probe_stage("second", placement=placement(EXECUTOR, **fields)))
    with pytest.raises(UserError) as refused:
        submit(EXECUTOR, plan)
    (problem,) = refused.value.problems
    assert "stage second" in problem.what
    assert words in problem.what.lower()
    assert problem.fix
    assert cluster.run(
        "squeue", "--noheader", "--states=all", f"--name={plan.id}.first", "--format=%T"
    ).stdout.split() in (
        ["CANCELLED"],
        [],
    ), "the first stage's job must not stay"
    assert _settled(JobHandle("slurm", plan.id, plan.run_dir, {"jobs": {}, "names": {}})).state == "cancelled"


def test_without_sbatch_the_plan_can_still_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    plan = plan_of(tmp_path / "run", probe_stage("first", placement=placement(EXECUTOR)))
    rendered = EXECUTOR.render(plan)
    write_run(plan, rendered)
    with pytest.raises(UserError, match="sbatch is not on the PATH"):
        EXECUTOR.submit(plan, rendered)


def test_a_job_of_an_interrupted_submission_does_nothing(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """sbatch took it, but its submitter never heard so, and submitted once more."""
    place = placement(EXECUTOR, additional_parameters={"hold": True})
    plan = plan_of(tmp_path / "run", probe_stage("first", placement=place))
    stray, rendered = submit(EXECUTOR, plan)
    handle = EXECUTOR.submit(plan, rendered)
    cluster.run("scontrol", "release", stray.native["jobs"]["first"])
    assert cluster.wait(stray.native["jobs"]["first"])["JobState"] == "FAILED"
    assert not _received(tmp_path, "first")
    assert EXECUTOR.liveness(handle) == "queued"
    (log,) = (tmp_path / "run" / "first" / "logs").glob("nodes-*.out")
    assert "left over from an interrupted submission" in log.read_text()
    cluster.run("scontrol", "release", handle.native["jobs"]["first"])
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}


def test_a_submitter_that_dies_after_sbatch_leaves_a_job_that_can_be_found(
    cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, _ = submit(
        EXECUTOR,
        plan_of(
            tmp_path / "run",
            probe_stage("first", placement=placement(EXECUTOR, additional_parameters={"hold": True})),
        ),
    )
    before = JobHandle(handle.executor, handle.run, handle.run_dir, {**handle.native, "jobs": {}})
    assert EXECUTOR.liveness(before) == "queued"
    EXECUTOR.cancel(before)
    assert cluster.job(handle.native["jobs"]["first"])["JobState"] == "CANCELLED"


def test_scancel_by_somebody_else(cluster: slurm.Cluster, tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path / "run",
        probe_stage("first", placement=placement(EXECUTOR), sleep=120),
        probe_stage("second", placement=placement(EXECUTOR)),
    )
    handle, _ = submit(EXECUTOR, plan)
    wait_for(lambda: _received(tmp_path, "first"))
    assert _settled(handle).state == "running"
    cluster.run("scancel", handle.native["jobs"]["first"])
    assert wait_until_over(EXECUTOR, handle) == "ended"
    view = _settled(handle)
    states = (view.state, view.stage("first").state, view.stage("second").state)
    assert states == ("cancelled", "cancelled", "pending"), f"{view.explanation}\n{events(handle)}"
    assert events(handle)[-1]["event"] == "cancelled"
    assert len(events(handle, "cancelled")) == 1, "written once, however often it is looked at"
    assert _settled(handle).state == "cancelled"


@pytest.mark.e2e
def test_nemo_runs_own_commands_find_the_run(
    cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    held = placement(EXECUTOR, additional_parameters={"hold": True})
    plan = plan_of(tmp_path / "run", probe_stage("first", placement=held), probe_stage("second", placement=held))
    handle, _ = submit(EXECUTOR, replace(plan, id="nano3-sft-tiny-0a64a012"))
    nemo, environ = Path(sys.executable).parent / "nemo", {**os.environ, "COLUMNS": "300"}

    def said(*words: str) -> str:
        done = subprocess.run(
            [nemo, "experiment", *words],
            env={**environ, "NEMORUN_HOME": str(tmp_path / "run" / "nemo_run")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "nano3-sft-tiny_0a64a012" in said("list", "nano3-sft-tiny")
    cluster.sacct_knows(*handle.native["jobs"].values())
    told = said("status", "nano3-sft-tiny_0a64a012")
    for stage, job in handle.native["jobs"].items():
        assert f": {stage}\n- Status: PENDING\n- Executor: SlurmExecutor on @localhost\n- Job id: {job}\n" in told
    EXECUTOR.cancel(handle)


def test_what_would_wait_for_ever_is_found_and_cancelled(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """Where the site does not know --kill-on-invalid-dep."""
    place = placement(EXECUTOR, remove=["kill-on-invalid-dep"])
    first = probe_stage("first", placement=place, exit=3, record=None)
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", first, probe_stage("second", placement=place)))
    job = handle.native["jobs"]["second"]
    wait_for(lambda: cluster.job(job)["Reason"] == "DependencyNeverSatisfied")
    view = lifecycle.load(tmp_path / "run")
    assert (view.state, view.stage("second").state) == ("failed", "pending")
    assert view.differences == (
        f"second: job {job} waited for a job that has failed, and would have done so for ever: it was cancelled",
    )
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    assert events(handle, "tidied") == [{"event": "tidied", "jobs": [job]}]
    assert lifecycle.load(tmp_path / "run").differences == (), "said once"


def test_scancel_before_it_started(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, additional_parameters={"hold": True})
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place)))
    assert EXECUTOR.liveness(handle) == "queued"
    assert _settled(handle).state == "pending"
    cluster.run("scancel", handle.native["jobs"]["first"])
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert _settled(handle).state == "cancelled"


@pytest.mark.e2e
def test_a_launcher_that_is_killed(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, nodes=2)
    stage = probe_stage("first", placement=place, launcher="torchrun", sleep=120)
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
    wait_for(lambda: _received(tmp_path, "first", 1) and _received(tmp_path, "first", 0))
    (started,) = events(handle, "stage-started")
    os.kill(psutil.Process(started["pid"]).ppid(), signal.SIGKILL)
    assert wait_until_over(EXECUTOR, handle) == "ended"
    view = _settled(handle)
    assert view.state == "failed"
    assert "137 (SIGKILL" in view.explanation
    pids = [_received(tmp_path, "first", rank)["pid"] for rank in (0, 1)]
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in [*pids, started["pid"]]))


def test_setup_that_fails_ends_the_run_with_its_words(cluster: slurm.Cluster, tmp_path: Path) -> None:
    place = placement(EXECUTOR, setup=["echo 'no such module' >&2; (exit 9)"])
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place)))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    view = _settled(handle)
    assert view.state == "failed"
    assert "exit code 9" in view.explanation
    assert "no such module" in view.explanation


def test_setup_reaches_every_node_and_is_not_traced(cluster: slurm.Cluster, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"export FROM_SETUP={SECRET}\n")
    place = placement(EXECUTOR, setup=[f". {tmp_path / 'key'}"])
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place)))
    assert wait_until_over(EXECUTOR, handle) == "ended"
    assert _received(tmp_path, "first")["env"]["FROM_SETUP"] == digest(SECRET)
    (log,) = (tmp_path / "run" / "first" / "logs").glob("slurm-*.out")
    assert "head_node=" in log.read_text(), "NeMo-Run's own lines are traced"
    assert SECRET not in log.read_text()


def test_a_node_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.require()
    with slurm.cluster("--nodes=2", "--account=lab") as cluster:
        _use(cluster, monkeypatch)
        plan = plan_of(
            tmp_path / "run",
            probe_stage("first", placement=placement(EXECUTOR, nodes=2), launcher="torchrun", sleep=300),
            probe_stage("second", placement=placement(EXECUTOR)),
        )
        handle, _ = submit(EXECUTOR, plan)
        wait_for(lambda: _received(tmp_path, "first", 1))
        slurm.manage("kill-node", "2", folder=cluster.folder)
        assert wait_until_over(EXECUTOR, handle, 120) == "ended"
        view = _settled(handle)
        assert (view.state, view.stage("first").state, view.stage("second").state) == ("failed", "failed", "pending")
        assert "node failed" in view.explanation
        assert "NODE_FAIL" in view.explanation
        found = diagnose(RunDir(tmp_path / "run"), "first", 1)
        assert found.cause is not None
        assert found.cause.name == "node-failure"
        assert view == _settled(handle)


def test_without_accounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.require()
    with slurm.cluster("--nodes=1", "--no-accounting") as cluster:
        _use(cluster, monkeypatch)
        plan = plan_of(tmp_path / "done", probe_stage("first", placement=placement(EXECUTOR)))
        handle, _ = submit(EXECUTOR, plan)
        assert wait_until_over(EXECUTOR, handle) == "ended"
        assert _settled(handle).state == "succeeded"
        plan = plan_of(tmp_path / "run", probe_stage("first", placement=placement(EXECUTOR), sleep=120))
        handle, _ = submit(EXECUTOR, plan)
        wait_for(lambda: _received(tmp_path, "first"))
        # It writes its state every few seconds; killed before, it forgets the job.
        wait_for(lambda: f"{plan.id}.first" in _read(cluster.folder / "state" / "job_state"))
        slurm.manage("kill-daemon", "slurmctld", folder=cluster.folder)
        assert EXECUTOR.liveness(handle) == "running", "nobody can be asked: what ran goes on"
        slurm.manage("start-daemon", "slurmctld", folder=cluster.folder)
        cluster.run("scancel", handle.native["jobs"]["first"])
        assert wait_until_over(EXECUTOR, handle) == "ended"
        assert _settled(handle).state == "cancelled"


@pytest.mark.long
def test_the_time_limit(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """Of a worker that does not heed its deadline."""
    stage = probe_stage("first", placement=placement(EXECUTOR, time="1"), sleep=300, deaf=True)
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", stage))
    assert wait_until_over(EXECUTOR, handle, 180) == "ended"
    view = _settled(handle)
    assert view.state == "failed"
    assert "time limit of 00:01:00" in view.explanation
    found = diagnose(RunDir(tmp_path / "run"), "first", 1)
    assert found.cause is not None
    assert found.cause.name == "time-limit"
    assert "train.resume" in view.explanation


def test_the_command_line(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """--batch, runs show, runs logs -f, runs cancel; the exit codes are the run's."""
    (tmp_path / "env.toml").write_text('[lab]\nexecutor = "slurm"\naccount = "lab"\ntime = "5"\nntasks_per_node = 2\n')
    command = ("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40")
    dry = _nemotron(tmp_path, *command, "--batch", "lab", "--dry-run")
    assert "#SBATCH --account=lab" in dry.stdout
    assert not (tmp_path / "nemotron-output").exists()
    told = json.loads(_nemotron(tmp_path, *command, "--batch", "lab", "--json").stdout)
    assert cluster.job(told["native"]["jobs"]["data-prep-sft"])["Account"] == "lab"
    followed = _nemotron(tmp_path, "runs", "logs", "-f", told["run"])
    assert "succeeded" in followed.stdout
    failed = _nemotron(tmp_path, *command, "--run", "lab", "data.sources=[{path: env.toml}]", code=1)
    assert "failed" in failed.stdout
    refused = _nemotron(tmp_path, *command, "--run", "lab", "--force", "run.partition=no-such", code=2)
    assert "partition" in refused.stderr
    assert "Traceback" not in refused.stderr
    held = "run.additional_parameters={hold: true}"
    told = json.loads(_nemotron(tmp_path, *command, "--force", "--batch", "lab", held, "--json").stdout)
    assert "pending" in _nemotron(tmp_path, "runs", "list").stdout
    assert "cancelled" in _nemotron(tmp_path, "runs", "cancel", told["run"]).stdout
    assert cluster.run("squeue", "--noheader", f"--name={told['run']}.data-prep-sft").stdout == ""


def _nemotron(cwd: Path, *words: str, code: int = 0, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "nemotron_recipes", *words]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL}
    done = subprocess.run(argv, cwd=cwd, env={**os.environ, "PYTHONPATH": str(source)}, **options)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _use(cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    return cluster


def _settled(handle: JobHandle) -> RunView:
    """The run as the command line sees it."""
    return load_run(Path(handle.run_dir), EXECUTOR.liveness, EXECUTOR.settle)


def _received(tmp_path: Path, stage: str, rank: int = 0) -> dict[str, Any]:
    return read_json(RunDir(tmp_path / "run").stage(stage).path / f"received-{rank}.json") or {}


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
