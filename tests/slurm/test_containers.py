"""Containers on a real Slurm whose Pyxis is a stand-in (slurm/pyxis_standin.c): what each task really gets, and faults.

Not proved here: Pyxis and enroot themselves, registries, GPUs in containers. docs/slurm.md says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes.artifacts.causes import diagnose
from nemotron_recipes.artifacts.records import RunView, load_run
from nemotron_recipes.executors.slurm import trial
from nemotron_recipes.executors.slurm.executor import SlurmExecutor
from nemotron_recipes.rundir import RunDir, read_json
from nemotron_recipes.sources import digest_of
from nemotron_recipes.spec import JobHandle, Placement, StagePlan
from tests.helpers import images, slurm
from tests.helpers.data_prep import bytes_of
from tests.helpers.executor_harness import events, placement, wait_until_over
from tests.helpers.plans import ROOT, plan_of, probe_stage, submit

pytestmark = pytest.mark.slurm

EXECUTOR = SlurmExecutor()
HELD = {"hold": True}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HF_HOME", raising=False)


@pytest.fixture
def cluster(slurm_cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    """The session's cluster, for this process as well."""
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    return slurm_cluster


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image as those of NVIDIA's registry: with a checkout in /opt, a version of torch and a search path."""
    slurm.require()
    folder = tmp_path_factory.mktemp("images")
    environment = {"FROM_IMAGE": "the image's", "KEPT": "the image's", "HF_HOME": "/image/hf", "PYTORCH_VERSION": "2.9"}
    files = {"/opt/Automodel/who": "the image's\n", "/opt/lib/of_image.py": "", "/etc/image": "one\n"}
    files["/opt/lib/broken.py"] = "import of_image\nimport no_such_library\n"
    tree = images.make_tree(folder / "tree")
    return images.make_image(folder / "one.sqsh", tree, {**environment, "PYTHONPATH": "/opt/lib"}, files)


def looking_stage(
    place: Placement,
    texts: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
    **orders: Any,
) -> StagePlan:
    look = json.dumps({"texts": texts, "writes": writes, "names": names})
    stage = probe_stage("first", placement=place, files={"look.json": look}, env={"PYTHONPATH": str(ROOT)}, **orders)
    return replace(stage, launch=replace(stage.launch, module="tests.helpers.container_probe"))


def placed(image: Path | str, **fields: Any) -> Placement:
    """In a container that has no interpreter's packages: the checkout is mounted, as a shared home would be."""
    mounts = [f"{ROOT}:{ROOT}:ro", *fields.pop("mounts", [])]
    # The launcher itself is found by the job's own search path, which the image's would cover.
    env = [*fields.pop("container_env", []), "PYTHONPATH"]
    return placement(EXECUTOR, container_image=str(image), mounts=mounts, container_env=env, **fields)


def run_of(tmp_path: Path, stage: StagePlan) -> tuple[JobHandle, list[dict[str, Any]]]:
    """Submit it alone, wait; its handle and what was seen on each node."""
    folder = tmp_path / "run"
    stage = replace(stage, launch=replace(stage.launch, args=(str(RunDir(folder).stage("first").path),)))
    plan = plan_of(folder, stage)
    if (folder / "code").is_dir():  # the launcher holds the copy against the plan
        plan = replace(plan, code=replace(plan.code, digest=digest_of(folder / "code" / "nemotron_recipes")))
    handle, _ = submit(EXECUTOR, plan)
    assert wait_until_over(EXECUTOR, handle, 120) == "ended"
    seen = [read_json(path) or {} for path in sorted((folder / "first").glob("seen-*.json"))]
    return handle, seen


def test_an_image_is_tried_before_anything_is_queued(
    cluster: slurm.Cluster, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node that is free, in a container as the stage's; where there is none, that is said."""
    monkeypatch.setattr(trial, "NODE_SECONDS", 120)  # other tests' jobs, and a loaded machine

    def told(imports: tuple[str, ...], image: Path | str = image, **fields: Any) -> list[tuple[bool, str]]:
        stage = looking_stage(placement(EXECUTOR, container_image=str(image), **fields))
        stage = replace(stage, launch=replace(stage.launch, imports=imports))
        found = EXECUTOR.preflight(plan_of(tmp_path / "run", stage))
        return [(problem.refuses, problem.what) for problem in found if "which image" not in problem.what[:12]]

    needed = ("json", "of_image", "broken")
    ((refuses, words),) = told(needed)
    assert refuses and f"need broken, which image {image} (Python 3." in words and "'no_such_library'" in words
    assert told(needed[:2]) == []
    ((refuses, words),) = told(needed, python="/no/such/python")
    assert refuses and "/no/such/python can't" in words
    ((refuses, words),) = told(needed, exclude="n[1-2]")
    assert not refuses and "could not be tried" in words
    fetched = told(needed, "r.io.invalid/team/image:1")
    assert not any(refuses for refuses, _ in fetched) and "is not tried: nodes would fetch it" in fetched[-1][1]


def test_what_every_task_gets(cluster: slurm.Cluster, image: Path, tmp_path: Path, monkeypatch: Any) -> None:
    checkout, shared, cache = tmp_path / "it's my checkout", tmp_path / "shared", tmp_path / "hf"
    for folder in (checkout, shared):
        folder.mkdir()
    (checkout / "who").write_text("mine\n")
    monkeypatch.setenv("KEPT", "the job's")
    monkeypatch.setenv("FROM_IMAGE", "the job's")
    monkeypatch.setenv("OF_JOB", "the job's")
    place = placed(
        image,
        nodes=2,
        mounts=[f"{checkout}:/opt/Automodel:ro+nosuid", f"{shared}:/data", "tmpfs:/scratch"],
        container_env=["KEPT"],
        container_workdir="/opt/Automodel",
        hf_cache=str(cache),
        env={"OF_PROFILE": "it's $HOME"},
    )
    texts = ("/opt/Automodel/who", "/etc/image", "/etc/os-release", str(ROOT / "LICENSE"))
    writes = ("/opt/Automodel/new", "/data/new", "/scratch/new", "/etc/new", f"{cache}/new", "/tmp/new")
    names = ("FROM_IMAGE", "KEPT", "OF_JOB", "OF_PROFILE", "HF_HOME", "HOME", "SLURM_JOB_ID", "RANK")
    handle, seen = run_of(tmp_path, looking_stage(place, texts, writes, names))
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}
    assert len(seen) == 2
    assert [here["host"] for here in seen] == events(handle, "stage-started")[0]["hosts"]
    for number, here in enumerate(seen):
        assert here["texts"]["/opt/Automodel/who"] == "mine\n", "the checkout lies over the image's own"
        assert here["texts"]["/etc/image"] == "one\n"
        assert here["texts"]["/etc/os-release"] is None, "nothing of the node's own system"
        assert here["texts"][str(ROOT / "LICENSE")]
        read_only = "Read-only file system"
        assert here["writes"] == dict(zip(writes, (read_only, "", "", read_only, "", ""), strict=True))
        assert here["env"] == {
            "FROM_IMAGE": "the image's",
            "KEPT": "the job's",
            "OF_JOB": "the job's",
            "OF_PROFILE": "it's $HOME",
            "HF_HOME": str(cache),
            "HOME": "/tmp",
            "SLURM_JOB_ID": handle.native["jobs"]["first"],
            "RANK": str(number),
        }
        assert here["cwd"] == "/opt/Automodel"
        assert str(Path.home()) not in here["mounts"]
        assert {"/opt/Automodel", "/data", "/scratch", "/nemo_run", str(ROOT), str(cache)} <= set(here["mounts"])
    assert (shared / "new").read_text() == "written\n"
    assert not (checkout / "new").exists()
    slurm.wait_for(lambda: not [*(cluster.folder / "containers").glob("step-*")], "the unpacked images to be gone")


def test_a_registry_name_a_kept_container_and_home(cluster: slurm.Cluster, image: Path, tmp_path: Path) -> None:
    (cluster.folder / "registry" / "nvcr.io#nvidia+kept+1.sqsh").symlink_to(image)
    place = placed("docker://nvcr.io/nvidia/kept:1", container_name="kept", container_mount_home=True)
    handle, (seen,) = run_of(tmp_path, looking_stage(place, texts=("/etc/image",), names=("HOME",)))
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}
    assert seen["texts"] == {"/etc/image": "one\n"}
    assert str(Path.home()) in seen["mounts"]
    assert seen["env"] == {"HOME": str(Path.home())}
    assert [*(cluster.folder / "containers").glob(f"{seen['host']}.kept")], "Pyxis keeps a container that has a name"


def test_the_search_path_of_the_image_stays(cluster: slurm.Cluster, image: Path, tmp_path: Path) -> None:
    """Behind the run's own: what NVIDIA's images have in PYTHONPATH is needed there."""
    fields = {"srun_args": ["--export=ALL,PYTHONPATH="], "container_env": [], "setup": []}
    place = placement(EXECUTOR, container_image=str(image), mounts=[f"{ROOT}:{ROOT}:ro"], **fields)
    folder = tmp_path / "run"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "nemotron_recipes").symlink_to(ROOT / "nemotron_recipes")  # as a run's copy of the code
    handle, (seen,) = run_of(tmp_path, looking_stage(place, names=("PYTHONPATH",)))
    assert events(handle)[-1] == {"event": "finished", "state": "succeeded"}
    assert seen["env"]["PYTHONPATH"] == f"{ROOT}{os.pathsep}/opt/lib"


@pytest.mark.parametrize("gone", ["image", "mount"])
def test_what_is_not_there_is_said_before_anything_is_queued(
    cluster: slurm.Cluster, image: Path, tmp_path: Path, gone: str
) -> None:
    where = str(tmp_path / "no such")
    place = placed(where if gone == "image" else image, mounts=[f"{where}:/x"] if gone == "mount" else [])
    plan = plan_of(tmp_path / "run", probe_stage("first", placement=place))
    (problem,) = [problem for problem in EXECUTOR.preflight(plan) if problem.refuses]
    assert where in problem.what
    assert "--skip-preflight" in problem.fix


@pytest.mark.parametrize(
    ("gone", "fields", "code", "explained", "told"),
    [
        ("image.sqsh", {}, 1, "missing-image", ("there is no image", "image.sqsh", "enroot import")),
        ("mounted", {}, 1, "bad-mount", ("there is no", "mounted to mount", "all nodes must see it")),
        pytest.param(
            *(None, {"container_image": "nvcr.io/nvidia/none:1"}, 1, "missing-image"),
            ("nvcr.io#nvidia/none:1", "can't be fetched", "tag"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            None,
            {"python": "python9", "nodes": 1},
            2,
            "container",
            ("there is no python9", "python = "),
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_was_not_there_when_the_job_ran(
    cluster: slurm.Cluster,
    image: Path,
    tmp_path: Path,
    gone: str | None,
    fields: dict[str, Any],
    code: int,
    explained: str,
    told: tuple[str, ...],
) -> None:
    """After it was queued: state, exit code, and words that name the thing, the node and what to do."""
    (tmp_path / "image.sqsh").symlink_to(image)
    (tmp_path / "mounted").mkdir()
    named = fields.pop("container_image", tmp_path / "image.sqsh")
    fields = {"nodes": 2, **fields}
    place = placed(named, mounts=[f"{tmp_path / 'mounted'}:/x"], additional_parameters=HELD, **fields)
    handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=place)))
    job = handle.native["jobs"]["first"]
    if gone:
        (tmp_path / gone).rename(tmp_path / "elsewhere")
    cluster.run("scontrol", "release", job)
    assert wait_until_over(EXECUTOR, handle, 120) == "ended"
    assert (cluster.job(job)["JobState"], cluster.job(job)["ExitCode"]) == ("FAILED", f"{code}:0")
    view = settled(handle)
    assert view.state == "failed"
    for words in (*told, "node"):
        assert words in view.explanation, view.explanation
    assert view == settled(handle)
    cause = diagnose(RunDir(tmp_path / "run"), "first", 1).cause
    assert cause is not None
    assert cause.name == explained


def test_a_cluster_without_pyxis(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slurm.cluster("--nodes=1", "--no-accounting") as plain:
        for name, value in plain.env.items():
            monkeypatch.setenv(name, value)
        handle, _ = submit(EXECUTOR, plan_of(tmp_path / "run", probe_stage("first", placement=placed(image))))
        assert wait_until_over(EXECUTOR, handle, 120) == "ended"
        assert plain.job(handle.native["jobs"]["first"])["JobState"] == "FAILED"
        view = settled(handle)
        assert view.state == "failed"
        assert "Pyxis is not there" in view.explanation
        assert "container = false" in view.explanation
        cause = diagnose(RunDir(tmp_path / "run"), "first", 1).cause
        assert cause is not None
        assert cause.name == "missing-pyxis"


@pytest.mark.e2e
def test_data_prep_in_a_container(cluster: slurm.Cluster, image: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The command line's whole way: the run's own copy of the code, store and inputs are where they must be."""
    write_profile(tmp_path, image)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+2?", "response": "4"}\n' * 40)
    monkeypatch.delenv("PYTHONPATH")
    words = ("nano3", "data", "prep", "sft", "-c", "tiny", "--run", "lab", "data.sources=[{path: rows.jsonl}]")
    plan = nemotron(tmp_path, *words, "--dry-run").stdout
    assert f"image        {image}" in plan
    assert f"mount        {tmp_path / 'rows.jsonl'}:{tmp_path / 'rows.jsonl'}:ro" in plan
    assert f"HF_HOME      {tmp_path / 'hf'}" in plan
    nemotron(tmp_path, *words)
    assert "nano3-tiny-sft-data" in nemotron(tmp_path, "artifacts", "list").stdout


@pytest.mark.e2e
@pytest.mark.long
def test_an_array_in_containers(cluster: slurm.Cluster, image: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each task has the container of the stage's job; the bytes are those of one machine."""
    (tmp_path / "rows").mkdir()
    for number in range(4):
        (tmp_path / "rows" / f"{number}.jsonl").write_text(f'{{"prompt": "{number}+2?", "response": "4"}}\n' * 40)
    monkeypatch.delenv("PYTHONPATH")
    words = ("nano3", "data", "prep", "sft", "-c", "tiny", "data.sources=[{path: ../rows}]")
    made = []
    for name in ("many", "one"):
        folder = tmp_path / name
        folder.mkdir()
        write_profile(folder, image)
        nemotron(folder, *words, *(("--run", "lab", "run.data_array=2") if name == "many" else ()))
        (metadata,) = (folder / "nemotron-output" / "store").rglob("metadata.json")
        made.append(bytes_of(metadata.parent))
    assert made[0] == made[1]
    logs = [path.read_text() for path in (tmp_path / "many").rglob("nodes-*_[01].out")]
    assert len(logs) == 2 and all("2 of 4 shards are done" in text for text in logs)
    for script in ("array.sh", "sbatch.sh"):
        (file,) = (tmp_path / "many" / "nemotron-output" / "runs").rglob(script)
        assert f"--container-image {image}" in file.read_text()


@pytest.mark.e2e
@pytest.mark.long
def test_the_tiny_pipeline_in_containers(cluster: slurm.Cluster, image: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Two nodes, two processes on each: torchrun's ranks meet from within their containers, and train."""
    from slurm.demo import SHORT

    write_profile(tmp_path, image, nodes=2, ntasks_per_node=2)
    monkeypatch.delenv("PYTHONPATH")
    nemotron(tmp_path, "nano3", "pipe", "-c", "tiny", "--run", "lab", *SHORT)
    (run,) = (tmp_path / "nemotron-output" / "runs").iterdir()
    for stage in ("sft", "dpo", "rl"):
        record = read_json(RunDir(run).stage(stage).record) or {}
        assert record["state"] == "succeeded"
        script = (run / stage / "files" / "sbatch.sh").read_text()
        assert f"--container-image {image}" in script


def write_profile(folder: Path, image: Path, **fields: Any) -> None:
    """This interpreter's packages and the system's libraries are mounted: the image holds neither torch nor hydra."""
    mounts = [f"{path}:{path}:ro" for path in (sys.prefix, "/usr/lib")]
    lines = {
        "executor": "slurm",
        "account": "lab",
        "time": "20",
        "container_image": str(image),
        "mounts": mounts,
        "hf_cache": str(folder / "hf"),
        "python": sys.executable,
        **fields,
    }
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in lines.items())
    (folder / "env.toml").write_text(f'[lab]\n{text}\n[lab.env]\nOMP_NUM_THREADS = "1"\n')


def nemotron(cwd: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "nemotron_recipes", *words]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(argv, cwd=cwd, env=environ, timeout=600, **quiet)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def settled(handle: JobHandle) -> RunView:
    """The run as the command line sees it."""
    return load_run(Path(handle.run_dir), EXECUTOR.liveness, EXECUTOR.settle)
