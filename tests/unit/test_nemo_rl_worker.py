"""The nemo_rl worker without NeMo-RL and Ray: fakes of both say what they were given and write what NeMo-RL writes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.backends import ray_nodes
from nemotron_recipes.errors import JobFailed, UserError
from nemotron_recipes.rundir import TRACKER, StageDir, latest_checkpoint, read_jsonl
from nemotron_recipes.spec import Artifact, Output
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.guest import LEAST_RESERVE
from nemotron_recipes.worker.nemo_rl import cluster, stage
from nemotron_recipes.worker.nemo_rl.checkpoints import adopt, continue_from
from nemotron_recipes.worker.trainer_wandb import TrainerRun
from tests.helpers.fake_nemo_rl import FAKE_TIMER

# Says what it was called with; with --block it stays, as a node of the cluster does.
FAKE_RAY = """\
#!{python}
import os, sys, time
for word in sys.argv:
    if word.startswith("--temp-dir="):
        os.makedirs(word[11:] + "/session_2026/logs")
        with open(word[11:] + "/session_2026/logs/raylet.out", "w") as out:
            out.write("head's\\n")
with open({log!r}, "a") as out:
    out.write(" ".join(sys.argv[1:]) + "|" + os.environ.get("RANK", "") + "\\n")
while "--block" in sys.argv:
    time.sleep(0.2)
"""
# As the real count does, it ends when as many nodes have started as were asked for.
FAKE_COUNT = """\
import os, sys, time
wanted, end = int(sys.argv[2]), time.time() + 120
while not os.path.exists({log!r}) or len(open({log!r}).readlines()) < wanted:
    time.sleep(0.05) if time.time() < end else sys.exit("too few nodes")
"""
EVENTS = Path(__file__).parents[1] / "recorded" / "tensorboard" / "nemo_rl"  # as its logger writes them
# Writes step_N as NeMo-RL does, for the steps in the file beside it, and its figures, and keeps its config.
FAKE_PROGRAM = """\
import json, os, shutil, sys, time, yaml
config = yaml.safe_load(open(sys.argv[2]))
root = config["checkpointing"]["checkpoint_dir"]
shutil.copytree({events!r}, config["logger"]["log_dir"] + "/exp_001/tensorboard", dirs_exist_ok=True)
shutil.copy(sys.argv[2], {told!r})
from nemo_rl.utils.timer import TimeoutChecker
open({told!r} + ".sys", "w").write(json.dumps([__name__, sys.path[0], sys.argv, time.time()]))
timeout = TimeoutChecker(timeout=config["checkpointing"]["checkpoint_must_save_by"], fit_last_save_time=True)
open({told!r} + ".clock", "w").write(json.dumps(timeout.start_time))
for step in json.load(open({steps!r})):
    os.makedirs(f"{{root}}/tmp_step_{{step}}/policy")
    open(f"{{root}}/tmp_step_{{step}}/training_info.json", "w").write("{{}}")
    os.rename(f"{{root}}/tmp_step_{{step}}", f"{{root}}/step_{{step}}")
    if timeout.check_save():
        break
"""


class Fakes:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.ray_log, self.told, self.steps = folder / "ray.txt", folder / "told.yaml", folder / "steps.json"
        (folder / "source" / "nemo_rl" / "utils").mkdir(parents=True)
        (folder / "source" / "nemo_rl" / "utils" / "timer.py").write_text(FAKE_TIMER)
        monkeypatch.setenv("PYTHONPATH", str(folder / "source"))
        for name in ("run_dpo.py", "configs/dpo.yaml"):
            (folder / "source" / "examples" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / "examples" / name).write_text("")
        program = FAKE_PROGRAM.format(told=str(self.told), steps=str(self.steps), events=str(EVENTS))
        (folder / "source" / "examples" / "run_dpo.py").write_text(program)
        ray = folder / "ray"
        ray.write_text(FAKE_RAY.format(python=sys.executable, log=str(self.ray_log)))
        ray.chmod(0o755)
        monkeypatch.setattr(cluster, "_program", lambda: str(ray))
        monkeypatch.setattr(cluster, "_COUNT", FAKE_COUNT.format(log=str(self.ray_log)))
        monkeypatch.setattr(cluster, "POLL", 0.05)
        monkeypatch.setattr(stage, "source_folder", lambda: folder / "source")
        monkeypatch.setenv("RANK", "0")  # torchrun's word, which neither Ray nor NeMo-RL may hear

    def ended(self) -> bool:
        """Whether every fake Ray that was started has gone."""
        return not subprocess.run(["pgrep", "-f", str(self.folder / "ray")], capture_output=True).stdout

    def ray(self) -> list[str]:
        return self.ray_log.read_text().splitlines()


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(tmp_path, monkeypatch)


def context_of(folder: Path, rank: int = 0, local_rank: int = 0, attempt: int = 1) -> Context:
    made = Context(
        *(rank, 2, local_rank, attempt, StageDir(folder / "stage"), {"id": "r", "stage": "s"}, Store(folder / "store")),
        {"checkpoint": Output("checkpoint", "made", "checkpoint")},
    )
    rows = folder / "rows"
    rows.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        row = {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": [], "rejected": []}
        (rows / split).mkdir(exist_ok=True)
        (rows / split / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (rows / "metadata.json").write_text(json.dumps({"method": "dpo", "format": "native", "splits": {}}))
    for key, kind, path in (("model.path", "model", folder / "model"), ("data.path", "data", rows)):
        made.artifacts[key] = Artifact("path", kind, uri=str(path))
        made.inputs[key] = path
    values = {"checkpointing": {"checkpoint_dir": str(made.dir.checkpoints)}, "dpo": {"max_num_steps": 4}}
    values["logger"] = {"log_dir": str(made.dir.path / "nemo_rl")}
    (folder / "plan.yaml").write_text(yaml.safe_dump(values))
    return made


def config_of(folder: Path, **more: object) -> dict[str, object]:
    told = {"method": "dpo", "script": "examples/run_dpo.py", "base": "examples/configs/dpo.yaml", "gym": False}
    return {
        **told,
        "config": str(folder / "plan.yaml"),
        "train_iters": 4,
        "ray": ray_nodes.nodes(1),
        "passes": None,
        "resume_from": None,
        **more,
    }


def test_two_nodes_from_the_head_to_the_output(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fakes.folder
    fakes.steps.write_text("[2, 4]")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    main, other = context_of(folder), context_of(folder, rank=1)
    main.wandb = TrainerRun("run-1.rl", "p", "team", "run-1", "rl", main.dir.path)
    node = threading.Thread(target=stage.run, args=(config_of(folder, ray=ray_nodes.nodes(2)), other))
    node.start()
    stage.run(config_of(folder, ray=ray_nodes.nodes(2)), main)
    node.join(timeout=300)
    assert not node.is_alive(), "the other node did not go when rank 0 had ended"

    calls = [line.partition("|")[0] for line in fakes.ray()]
    (head,) = [call for call in calls if call.startswith("start --head --node-ip-address=127.0.0.1 --port=")]
    port, temp = (head.partition(f"--{name}=")[2].split()[0] for name in ("port", "temp-dir"))
    ports = "--min-worker-port=10002 --max-worker-port=11000"
    assert f"start --address=127.0.0.1:{port} {ports} --disable-usage-stats --block" in calls
    logs = main.dir.path / "ray" / "attempt-1" / "logs"
    (kept,) = logs.glob("0-*/raylet.out")  # the other "node" may find that tidied: it is the head's disk
    assert kept.read_text() == "head's\n"
    assert not Path(temp).exists(), "Ray's folder stayed behind"
    assert fakes.ended()
    assert all(line.endswith("|") for line in fakes.ray()), "torchrun's RANK reached Ray"

    told = yaml.safe_load(fakes.told.read_text())
    assert told["defaults"] == str(folder / "source" / "examples" / "configs" / "dpo.yaml")
    assert told["policy"] == {"model_name": str(folder / "model"), "tokenizer": {"name": str(folder / "model")}}
    train = Path(told["data"]["train"]["data_path"])
    assert json.loads(train.read_text())["context"] == [{"role": "user", "content": "2+2?"}]
    assert told["data"]["train"]["dataset_name"] == "PreferenceDataset"
    named = {"project": "p", "name": "run-1.rl", "entity": "team"}
    assert told["logger"] == {"log_dir": str(main.dir.path / "nemo_rl"), "wandb_enabled": True, "wandb": named}
    made = main.output("checkpoint") / "iter_0000004"
    assert (made / "training_info.json").is_file()
    assert main.results == {"step": 4, "loss": 0.35, "validation_loss": 0.75}
    assert [row["step"] for row in read_jsonl(main.dir.metrics)] == [0, 1, 2]
    assert (main.dir.checkpoints / TRACKER).read_text() == "4\n"


def test_a_rank_that_is_not_its_nodes_first_has_nothing_to_do(fakes: Fakes) -> None:
    stage.run(config_of(fakes.folder), context_of(fakes.folder, rank=3, local_rank=3))
    assert not fakes.ray_log.exists()


def test_an_early_end_is_a_failure_and_the_cluster_goes(fakes: Fakes) -> None:
    fakes.steps.write_text("[2]")
    with pytest.raises(JobFailed, match="NeMo-RL ended with 0 after step 2 of 4"):
        stage.run(config_of(fakes.folder), context_of(fakes.folder))
    assert len(fakes.ray()) == 1 and fakes.ended()


def test_the_deadline_becomes_the_time_of_the_last_save(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.steps.write_text("[2]")
    monkeypatch.setenv("NEMOTRON_DEADLINE", "1000.0")  # long over
    context = context_of(fakes.folder)
    stage.run(config_of(fakes.folder), context)
    assert yaml.safe_load(fakes.told.read_text())["checkpointing"]["checkpoint_must_save_by"] == "00:00:00:00"
    assert context.time_is_up and context.stop_seen and not context.staged
    events = [event["event"] for event in read_jsonl(context.dir.events(1, 0))]
    assert "checkpoint-saved" in events and "stopped" in events
    assert stage.duration(90061) == "01:01:01:01"


def test_the_clock_begins_before_nemo_rl_does_and_the_script_does_not_notice(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline is hours away, the second save comes in time: what counts is from when NeMo-RL counts."""
    fakes.steps.write_text("[2, 4]")
    deadline = time.time() + 7200
    monkeypatch.setenv("NEMOTRON_DEADLINE", repr(deadline))
    context = context_of(fakes.folder)
    stage.run(config_of(fakes.folder), context)
    assert context.results["step"] == 4 and not context.time_is_up
    name, path, argv, program_began = json.loads((fakes.folder / "told.yaml.sys").read_text())
    script = str(fakes.folder / "source" / "examples" / "run_dpo.py")
    assert (name, path) == ("__main__", str(fakes.folder / "source" / "examples"))
    assert argv == [script, "--config", str(context.dir.path / stage.FILE)]
    began = json.loads((fakes.folder / "told.yaml.clock").read_text())
    assert began < program_began, "Ray and the program had started when the clock began"
    left = yaml.safe_load(fakes.told.read_text())["checkpointing"]["checkpoint_must_save_by"]
    days, hours, minutes, seconds = map(int, left.split(":"))
    by = began + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert deadline - LEAST_RESERVE - 1.0 <= by <= deadline - LEAST_RESERVE


def test_nemo_rl_may_stop_before_its_limit(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops when one more step might not fit, which may be long before: that, too, is the time limit."""
    timer = fakes.folder / "source" / "nemo_rl" / "utils" / "timer.py"
    timer.write_text(FAKE_TIMER.replace("return time.time() - self.start_time >= self.last_save_time", "return True"))
    fakes.steps.write_text("[2, 4]")
    monkeypatch.setenv("NEMOTRON_DEADLINE", repr(time.time() + 7200))
    context = context_of(fakes.folder)
    stage.run(config_of(fakes.folder), context)
    assert context.time_is_up and context.stop_seen and not context.staged


def test_another_clock_is_no_reason_to_miss_the_deadline(fakes: Fakes) -> None:
    timer = fakes.folder / "source" / "nemo_rl" / "utils" / "timer.py"
    timer.write_text(FAKE_TIMER.replace("self.start_time", "self.began"))
    fakes.steps.write_text("[2, 4]")
    with pytest.raises(JobFailed, match="NeMo-RL ended with 1 after step 0 of 4"):
        stage.run(config_of(fakes.folder), context_of(fakes.folder))


def test_without_a_deadline_the_examples_own_limit_is_none(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMOTRON_DEADLINE", raising=False)
    fakes.steps.write_text("[4]")
    stage.run(config_of(fakes.folder), context_of(fakes.folder))
    told = yaml.safe_load(fakes.told.read_text())["checkpointing"]
    assert "checkpoint_must_save_by" in told and told["checkpoint_must_save_by"] is None


@pytest.mark.parametrize("time_is_up", [True, False])
def test_the_end_of_the_passes_is_an_end(fakes: Fakes, monkeypatch: pytest.MonkeyPatch, time_is_up: bool) -> None:
    """With a limit of passes the last checkpoint is the output; when the time was up first, it is none yet."""
    fakes.steps.write_text("[3]")
    context = context_of(fakes.folder)
    if time_is_up:
        monkeypatch.setenv("NEMOTRON_DEADLINE", "1000.0")
    else:
        context.dir.path.mkdir(parents=True, exist_ok=True)
        (context.dir.path / stage.TIME_IS_UP).touch()  # of the attempt before
    stage.run(config_of(fakes.folder, passes=1, train_iters=1_000_000), context)
    assert context.time_is_up is time_is_up and bool(context.staged) is not time_is_up
    if not time_is_up:
        assert context.results["step"] == 3
        assert (context.output("checkpoint") / "iter_0000003" / "training_info.json").is_file()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_found_before_ray_starts(fakes: Fakes, split: str) -> None:
    context = context_of(fakes.folder)
    (fakes.folder / "rows" / split / "rows.jsonl").write_text("\n")
    with pytest.raises(UserError, match=f"the {split} split is empty"):
        stage.run(config_of(fakes.folder), context)
    (fakes.folder / "rows" / "metadata.json").unlink()  # in NeMo-RL's own layout
    for name in stage.SPLITS:
        (fakes.folder / "rows" / f"{name}.jsonl").write_text("" if name == split else "{}\n")
    with pytest.raises(UserError, match=f"the {split} split is empty"):
        stage.run(config_of(fakes.folder), context)
    assert not fakes.ray_log.exists()


def test_a_head_that_does_not_start_is_told_at_once(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fakes.folder / "ray"
    ray.write_text("#!/bin/sh\necho no port is free >&2\nexit 3\n")
    with pytest.raises(JobFailed, match=r"Ray's head on .* ended with 3"):
        stage.run(config_of(fakes.folder), context_of(fakes.folder))


def test_a_head_that_ends_takes_the_program_with_it(fakes: Fakes) -> None:
    ended = fakes.folder / "ended.txt"
    ray = fakes.folder / "ray"
    told_to_end = f"time.sleep(0.2)\n    os.path.exists({str(ended)!r}) and sys.exit(4)"
    ray.write_text(ray.read_text().replace("time.sleep(0.2)", told_to_end))
    program = f"import time\nopen({str(ended)!r}, 'w')\ntime.sleep(600)\n"
    (fakes.folder / "source" / "examples" / "run_dpo.py").write_text(program)
    with pytest.raises(JobFailed, match=r"Ray's head on .* ended with 4"):
        stage.run(config_of(fakes.folder), context_of(fakes.folder))
    script = str(fakes.folder / "source" / "examples" / "run_dpo.py")
    assert not subprocess.run(["pgrep", "-f", script], capture_output=True).stdout, "the program goes on"


def test_open_files_are_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(cluster.resource, "setrlimit", lambda kind, limits: told.append(limits))
    for limits in ((1024, 1 << 20), (1024, 4096), (1 << 20, 1 << 20), (1024, cluster.resource.RLIM_INFINITY)):
        monkeypatch.setattr(cluster.resource, "getrlimit", lambda kind, limits=limits: limits)
        cluster._open_files(65535)
    assert told == [(65535, 1 << 20), (4096, 4096), (65535, cluster.resource.RLIM_INFINITY)]
    assert capsys.readouterr().err == "warning: 4096 open files are allowed here, Ray wants 65535\n"


def test_a_wish_to_stop_ends_the_program(fakes: Fakes) -> None:
    (fakes.folder / "source" / "examples" / "run_dpo.py").write_text("import time\ntime.sleep(600)\n")
    context = context_of(fakes.folder)
    context.stop_signal = True
    stage.run(config_of(fakes.folder), context)
    assert context.stop_seen and not context.staged


def test_it_continues_from_another_runs_checkpoint(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for root in (there, here):
        root.mkdir()
    (there / "step_6").mkdir()
    (there / "step_6" / "training_info.json").write_text("{}")
    (there / "tmp_step_8").mkdir()  # killed while it saved
    link = adopt(there)
    assert link is not None and link.name == "iter_0000006"
    continue_from(link, here)
    assert (here / "step_6" / "training_info.json").read_text() == "{}" and latest_checkpoint(here) is None
    assert adopt(here) == latest_checkpoint(here)
    continue_from(Path("/nowhere"), here)  # a later attempt has its own
    with pytest.raises(UserError, match="isn't a whole checkpoint of NeMo-RL"):
        continue_from(tmp_path, tmp_path / "new")


def test_removed_checkpoints_lose_their_names(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step_{step}").mkdir()
        adopt(tmp_path)
    (tmp_path / "step_1").rmdir()  # NeMo-RL keeps the newest alone
    adopt(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002"]
