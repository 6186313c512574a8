"""What a Slurm profile becomes: whole scripts as golden files, and what is refused. No Slurm is needed here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nemotron_recipes.executors import nemo_adapter
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.executors.slurm.meeting import FIRST_PORT, PORTS, NoMeeting, hold_port, told_port
from nemotron_recipes.executors.slurm.profile import NOT_HERE, OTHER_NAMES, SlurmProfile
from nemotron_recipes.executors.slurm.script import resolved, shell_command
from nemotron_recipes.planning.validate import check_run
from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Artifact, Placement, Plan, Rendered, Request
from tests.helpers.plans import plan_of, probe_stage

EXECUTOR = SlurmExecutor()
GOLDEN = Path(__file__).parents[1] / "golden"
RUN_DIR = Path("/lustre/me/runs/nano3-sft-default-1d1d1d1d")

# As it is published; it must work as it stands.
PUBLISHED = {
    "executor": "slurm",
    "account": "YOUR-ACCOUNT",
    "partition": "batch",
    "nodes": 2,
    "ntasks_per_node": 8,
    "gpus_per_node": 8,
    "mounts": ["/lustre:/lustre"],
}
BARE_METAL = {
    "account": "lab",
    "run_partition": "interactive",
    "batch_partition": "long",
    "time": "04:00:00",
    "nodes": 4,
    "nproc_per_node": 8,
    "gres": "gpu:h100:8",
    "mem": "0",
    "exclusive": True,
    "constraint": "h100&nvlink",
    "signal": "TERM@300",
    "cpus_per_task": 96,
    "dependency": "afterany:1234",
    "additional_parameters": {"reservation": "maintenance week", "hold": True, "nice": 100},
    "srun_args": ["--mpi=pmix", "--cpu-bind=none"],
    "remove": ["kill-on-bad-exit", "kill_on_invalid_dep"],
    "setup": ["module load cuda/12.8", 'source "$HOME/venv/bin/activate"'],
    "env": {"NCCL_DEBUG": "INFO", "GREETING": "it's $(whoami)\nand more"},
    "secrets": ["WANDB_API_KEY"],
    "container": False,
    "container_image": "not-used",
    "python": "/opt/venv/bin/python",
}
ARRAY = {"account": "lab", "data_array": 8, "max_requeues": 2, "dependency": "afterok:7"}
CONTAINER = {
    "account": "lab",
    "nodes": 2,
    "nproc_per_node": 4,
    "gpus_per_node": 4,
    "segment": 2,
    "container_image": "/lustre/images/it's nemo.sqsh",
    "mounts": ["/lustre:/lustre:ro", "/a b:/c d"],
    "container_env": ["HF_HOME"],
}


@pytest.fixture(autouse=True)
def no_cache_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)


def placement_of(**fields: Any) -> Placement:
    options = SlurmProfile(**fields).model_dump()
    names = tuple(options.pop("secrets"))
    return Placement("slurm", "site", options.pop("nodes"), options.pop("nproc_per_node"), options, names)


def pipe_of(fields: dict[str, Any], mode: str = "batch") -> Plan:
    """A stage of one process, then one that trains, as planning places them."""
    training = placement_of(**fields)
    first = probe_stage("data-prep-sft", placement=replace(training, nodes=1, nproc_per_node=1))
    first = replace(first, launch=replace(first.launch, part_module="tests.helpers.part"))
    second = probe_stage("sft", ("--config", "it's"), placement=training, launcher="torchrun")
    plan = plan_of(RUN_DIR, first, second)
    return replace(plan, id=RUN_DIR.name, request=Request("nano3", ("pipe",), mode=mode))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "fields"),
    [("published", PUBLISHED), ("bare-metal", BARE_METAL), ("container", CONTAINER), ("array", ARRAY)],
)
def test_golden_script(
    name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value")
    plan = pipe_of(fields)
    assert [problem for stage in plan.stages for problem in EXECUTOR.check(stage)] == []
    rendered = EXECUTOR.render(plan)
    assert EXECUTOR.render(plan) == rendered
    text = as_text(rendered)
    assert "s3cr3t" not in text
    file = GOLDEN / f"slurm-{name}.txt"
    if pytestconfig.getoption("--update-golden"):
        file.write_text(text)
    assert file.exists(), f"{file} is missing: make it with pytest --update-golden"
    assert text == file.read_text(), "the job changed; if that is meant: pytest --update-golden, and read the diff"


def test_ids_take_the_places_of_stages() -> None:
    """A stage that was done before, and its array, leave nothing behind; a dependency on a job of the user's stays."""
    array, prep, training = EXECUTOR.render(pipe_of(ARRAY)).submit
    ids = {"data-prep-sft.array": "10", "data-prep-sft": "11"}
    assert dependency(resolved(array, ids, {})) == []
    assert dependency(resolved(prep, ids, {})) == ["--dependency=afterok:7,afterany:10"]
    assert dependency(resolved(training, ids, {})) == ["--dependency=afterok:11"]
    assert dependency(resolved(training, {}, {})) == []


def dependency(argv: list[str]) -> list[str]:
    return [word for word in argv if word.startswith("--dependency")]


def test_what_an_array_cannot_be_joined_with() -> None:
    stage = pipe_of({**ARRAY, "dependency": "afterok:7?afterok:8"}).stages[0]
    (problem,) = EXECUTOR.check(stage)
    assert "an array" in problem.what


def test_a_followed_run_goes_to_its_own_partition() -> None:
    for mode, partition in (("run", "interactive"), ("batch", "long")):
        assert f"#SBATCH --partition={partition}\n" in script_of(pipe_of(BARE_METAL, mode))
    assert "--partition" not in script_of(pipe_of({"account": "lab"}))


def test_what_is_not_set_has_no_line() -> None:
    lines = [line for line in script_of(pipe_of({})).splitlines() if line.startswith("#SBATCH")]
    assert [line.partition("=")[0].removeprefix("#SBATCH --") for line in lines] == [
        "job-name",
        "nodes",
        "ntasks-per-node",
        "output",
    ]


def test_paths_that_nemo_run_would_rewrite_stay() -> None:
    plan = pipe_of({"setup": ["cd /nemo_run/code && ls '/a/nemo_run'"], "python": "/nemo_run/bin/python"})
    assert "cd /nemo_run/code && ls '/a/nemo_run'\n" in script_of(plan)
    assert " /nemo_run/bin/python -m nemotron_recipes.executors.slurm.launch " in script_of(plan)


def test_container_flags_follow_the_profile() -> None:
    fields: dict[str, Any] = {"container_image": "nvcr.io/nvidia/nemo:25.07", "mounts": ["/a", "/b c:/d:ro+nosuid"]}
    line = srun_of(fields)
    assert " --container-image 'nvcr.io#nvidia/nemo:25.07' " in line
    assert " --container-mounts /a:/a,'/b c:/d:ro+nosuid',/lustre/me/runs/" in line
    assert " --container-workdir /nemo_run/code " in line
    assert " --no-container-mount-home " in line
    for name in ("remap-root", "writable", "readonly", "entrypoint", "name", "env"):
        assert f"container-{name}" not in line
    line = srun_of(
        {
            **fields,
            "container_name": "nemo",
            "container_mount_home": True,
            "container_remap_root": False,
            "container_writable": False,
            "container_entrypoint": True,
            "container_env": ["A", "B"],
        }
    )
    assert " --container-env A,B " in line
    wanted = "--container-name=nemo --container-mount-home --no-container-remap-root --container-readonly"
    assert f" {wanted} --container-entrypoint python3 -m " in line
    assert "container" not in srun_of({**fields, "container": False})
    for container, workdir in ((True, "/opt/x"), (False, None)):
        stage = EXECUTOR.render(pipe_of({**fields, "container": container, "container_workdir": "/opt/x"})).stages[-1]
        assert stage.workdir == workdir


def test_container_flags_that_a_site_does_not_know_can_be_taken_out() -> None:
    fields = {"container_image": "/a b.sqsh", "mounts": ["/a b:/c"], "container_env": ["A"]}
    line = srun_of({**fields, "remove": ["container-env", "no_container_mount_home", "--container-mounts"]})
    assert "container-env" not in line
    assert "mount" not in line
    assert "--container-image '/a b.sqsh' --container-workdir /nemo_run/code --wait=60 " in line


def test_the_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder in the job and on the host, whatever the image has in HF_HOME."""
    image = {"container_image": "/i.sqsh"}
    assert "HF_HOME" not in EXECUTOR.render(pipe_of(image)).stages[-1].env
    for fields in ({"hf_cache": "/lustre/hf"}, {"env": {"HF_HOME": "/lustre/hf"}}):
        stage = EXECUTOR.render(pipe_of({**image, **fields})).stages[-1]
        assert stage.env["HF_HOME"] == "/lustre/hf"
        assert ("HF_HOME", "/lustre/hf") in stage.notes
        assert ",/lustre/hf:/lustre/hf," in srun_of({**image, **fields})
    monkeypatch.setenv("HF_HOME", "/home/me/hf")
    assert EXECUTOR.render(pipe_of({})).stages[-1].env["HF_HOME"] == "/home/me/hf"
    assert EXECUTOR.render(pipe_of({"hf_cache": "/lustre/hf"})).stages[-1].env["HF_HOME"] == "/lustre/hf"


def test_a_shell_gets_the_container_of_its_stage() -> None:
    fields: dict[str, Any] = {
        "container_image": "nvcr.io/nvidia/nemo:1",
        "mounts": ["/a:/b:ro"],
        "container_env": ["A"],
    }
    plan = pipe_of({**fields, "remove": ["no-container-mount-home"]})
    argv = shell_command(plan, plan.stages[-1], "17", ["bash"])
    assert argv[:3] == ["srun", "--jobid=17", "--overlap"]
    assert "--container-image=nvcr.io#nvidia/nemo:1" in argv
    assert f"--container-mounts=/a:/b:ro,{RUN_DIR}:{RUN_DIR},{plan.store}:{plan.store}" in argv
    assert "--container-env=A" in argv
    assert "--no-container-mount-home" not in argv
    assert argv[-1] == "bash"


def test_inputs_from_outside_are_mounted_read_only(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    plan = pipe_of({"container_image": "/i.sqsh", "mounts": ["/lustre:/lustre"]})
    inputs = {
        "model.path": Artifact("path", "model", uri="/lustre/models/base"),
        "data.sources.0.path": Artifact("path", "data", uri=f"{tmp_path}/rows/*.jsonl"),
        "data.sources.1.path": Artifact("path", "data", uri=f"{tmp_path}/rows/more.jsonl"),
        "data.sources.2.path": Artifact("path", "data", uri=f"{RUN_DIR}/first/rows.jsonl"),
    }
    plan = replace(plan, stages=(*plan.stages[:-1], replace(plan.stages[-1], inputs=inputs)))
    mounts = [text for name, text in EXECUTOR.render(plan).stages[-1].notes if name == "mount"]
    assert [mount for mount in mounts if mount.endswith(":ro")] == [f"{tmp_path}/rows:{tmp_path}/rows:ro"]


def test_what_a_plan_says_of_a_container() -> None:
    plan = pipe_of({"container_image": "docker://nvcr.io/nvidia/nemo:25.07", "container_name": "kept"})
    hub = {"model.path": Artifact("hub", "model", "org/name")}
    plan = replace(plan, stages=(*plan.stages[:-1], replace(plan.stages[-1], inputs=hub)))
    notes = EXECUTOR.render(plan).stages[-1].notes
    assert notes[0] == ("image", "nvcr.io#nvidia/nemo:25.07  (written docker://nvcr.io/nvidia/nemo:25.07)")
    told = [text for name, text in notes if name == "note"]
    assert len(told) == 2
    assert "container kept already" in told[0]
    assert "hf_cache" in told[1]


def test_a_setup_line_is_not_traced_and_must_succeed() -> None:
    lines = script_of(pipe_of({"setup": ["module load x"]})).splitlines()
    place = lines.index("module load x")
    assert lines[place - 2 : place + 2] == ["set +vx", "set -e", "module load x", "set +e"]


@pytest.mark.parametrize(
    "fields",
    [
        {"nproc_per_node": 4, "ntasks_per_node": 8},
        {"mounts": ["/a:/a"], "container_mounts": ["/b:/b"]},
        {"ntasks_per_node": "8"},
        {"nodes": 0},
        {"gpus": 8},
        {"time": 1.5},
        {"env": {"A": 1}},
    ],
)
def test_a_profile_is_closed_and_strict(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SlurmProfile(**fields)


def test_two_names_of_one_field() -> None:
    assert SlurmProfile(ntasks_per_node=8) == SlurmProfile(nproc_per_node=8)
    assert SlurmProfile(ntasks_per_node=8, nproc_per_node=8).nproc_per_node == 8
    assert SlurmProfile(time=30, mem=0) == SlurmProfile(time="30", mem="0")
    assert SlurmProfile(setup_lines="a\nb").setup == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"additional_parameters": {"time": "10"}}, "field of its own"),
        ({"additional_parameters": {"ntasks_per_node": 8}}, "decided by the executor"),
        ({"additional_parameters": {"array": "0-3"}}, "decided by the executor"),
        ({"additional_parameters": {"--hold": True}}, "no flag"),
        ({"comment": "a\nb"}, "no #SBATCH line"),
        ({"srun_args": ["a\nb"]}, "line break"),
        ({"container": True}, "no image"),
        ({"container_name": "x"}, "no image"),
        ({"container_image": "nemo.sqsh"}, "relative path"),
        ({"container_image": "nvcr.io/NVIDIA/nemo"}, "no image"),
        ({"container_image": "/i.sqsh", "mounts": ["a:/b"]}, "full path"),
        ({"container_image": "/i.sqsh", "mounts": ["/a:/nemo_run"]}, "covers"),
        ({"container_image": "/i.sqsh", "container_name": "a b"}, "no name"),
        ({"container_image": "/i.sqsh", "container_workdir": "opt"}, "not a full path"),
        ({"container_image": "/i.sqsh", "container_env": ["A=1"]}, "no name"),
        ({"hf_cache": "~/hf"}, "not a full path"),
        ({"hf_cache": "/a", "env": {"HF_HOME": "/b"}}, "one thing"),
        ({"env": {"PET_MASTER_ADDR": "x"}}, "set by the executor"),
        ({"secrets": ["NO_SUCH_TOKEN"]}, "not set"),
    ],
)
def test_check_refuses(fields: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    (problem,) = EXECUTOR.check(replace(probe_stage("sft", placement=placement_of(**fields)), directory="/run/sft"))
    assert told in problem.what
    assert problem.where
    assert problem.fix


def test_every_field_of_nemo_runs_executor_is_taken_or_refused_with_a_reason() -> None:
    with nemo_adapter.imported():
        from nemo_run.core.execution.slurm import SlurmExecutor as Theirs
    base = {"experiment_id", "job_dir", "experiment_dir"}  # how NeMo-Run hands itself down
    theirs = {f.name for f in fields_of(Theirs) if f.init and not f.name.startswith("_")} - base
    assert theirs - {*SlurmProfile.model_fields, *OTHER_NAMES} == {*NOT_HERE}
    (problem,) = check_run({"executor": "slurm", "array": "0-3"}, lambda key: "command line")[1]
    assert (problem.what, "max_requeues" in problem.fix) == ("'run.array' is not to be set here", True)


def test_leptonai_is_left_out_of_nemo_run_for_a_while_only() -> None:
    code = (
        "import sys; from nemotron_recipes.executors import nemo_adapter\n"
        "with nemo_adapter.imported():\n"
        "    from nemo_run.core.execution.lepton import APIClient\n"
        "assert not {'leptonai', 'torch'} & {name.partition('.')[0] for name in sys.modules}\n"
        "try:\n    APIClient()\nexcept ImportError as error:\n    print(error)\n"
        "import leptonai; assert leptonai.__file__"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "left out" in done.stdout) == (0, True), done.stderr


def test_one_process_on_two_nodes_is_refused() -> None:
    (problem,) = EXECUTOR.check(replace(probe_stage("sft", placement=placement_of(nodes=2)), directory="/run/sft"))
    assert "2 nodes" in problem.what


def test_a_port_is_held_against_other_jobs_but_not_against_the_store(tmp_path: Path) -> None:
    stage, job = StageDir(tmp_path), str(os.getpid())
    held, port = hold_port(stage, 1, job)
    with held:
        assert FIRST_PORT <= port < FIRST_PORT + PORTS
        assert told_port(stage, 1, job, lambda: False) == port
        other, another = hold_port(stage, 2, job)  # as the same number of another cluster's job
        with other:
            assert another != port
        with socket.create_server(("", port)) as store:  # sets SO_REUSEADDR, as torch's store does
            third, another = hold_port(stage, 3, job)
            with third:
                assert another != store.getsockname()[1]


def test_a_node_that_is_told_no_port_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageDir(tmp_path)
    held, _ = hold_port(stage, 1, "1")
    held.close()
    with pytest.raises(NoMeeting, match="told no port"):
        told_port(stage, 1, "2", lambda: True)  # what another job has left there does not count
    monkeypatch.setattr("nemotron_recipes.executors.slurm.meeting.TRIES", 0)
    with pytest.raises(NoMeeting, match="no port is free"):
        hold_port(stage, 1, "1")


def srun_of(fields: dict[str, Any]) -> str:
    """The line of the script that starts the launchers."""
    return next(line for line in script_of(pipe_of(fields)).splitlines() if line.startswith("srun "))


def script_of(plan: Plan) -> str:
    files = EXECUTOR.render(plan).stages[-1].files
    return next(text for path, text in files.items() if path.endswith("/sbatch.sh"))


def as_text(rendered: Rendered) -> str:
    lines = []
    for stage in rendered.stages:
        for path, text in stage.files.items():
            if not path.endswith("probe.json"):
                lines += [f"==> {path}", text]
    lines += ["==> submitted with", *(" ".join(command) for command in rendered.submit), ""]
    return "\n".join(lines).replace(sys.executable, "python")
