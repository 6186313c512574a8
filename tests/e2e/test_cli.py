"""The commands as a user types them, as whole processes: exit codes, messages, detaching, cancelling, applying."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SLOW_ROWS = 400_000  # data prep of so many sample rows takes long enough to be stopped in the middle


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


def nemotron(cwd: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemotron_recipes", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300)


def refused(cwd: Path, *arguments: str, **extra: str) -> str:
    """stderr of a request that must be refused: exit code 2, no traceback, nothing written."""
    before = sorted(cwd.rglob("*"))
    done = nemotron(cwd, *arguments, **extra)
    assert done.returncode == 2, (arguments, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith(("error:", "Usage:")), done.stderr
    assert sorted(cwd.rglob("*")) == before
    return done.stderr


PREP = ("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "20")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nano3", "sft", "--dry-rnu"), "Did you mean '--dry-run'"),
        (("nano3", "sft", "--run"), "'--run' requires an argument"),
        (("nano3", "sft", "--batch"), "'--batch' requires an argument"),
        (("nano3", "sft", "--run", "--dry-run"), "--run needs a profile, not '--dry-run'"),
        (("nano3", "sft", "--run", "optimizer.lr=1"), "--run needs a profile"),
        (("nano3", "data", "prep", "sft", "-c", "tiny", "--run="), "--run needs a profile, not ''"),
        (("nano3", "data", "prep", "sft", "-c", "tiny", "--batch", ""), "--batch needs a profile, not ''"),
        (("nano3", "data", "prep", "sft", "-c", "tiny", "--plan-out="), "--plan-out needs a file, not ''"),
        (("--config-dir=", "nano3", "sft"), "--config-dir needs a folder"),
        (("nano3", "sft", "--run", "a", "--batch", "b"), "exclude each other"),
        (("nano3", "sft", "--run", "nowhere", "-c", "tiny"), "unknown profile 'nowhere'"),
        (("nano3", "sft", "-c", "tinny"), "unknown config 'tinny'"),
        (("nano4", "sft"), "did you mean 'nano3'?"),
        (("nano3", "sff"), "did you mean 'sft'?"),
        (("nano3", "data", "prep", "sff"), "did you mean 'sft'?"),
        (("--hepl",), "Did you mean '--help'"),
        (("nano3", "sft", "tiny"), "a config is chosen with -c NAME"),
        (("nano3", "sft", "-c", "tiny", "--sample", "5"), "No such option '--sample'"),
        (("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "0"), "--sample"),
        (("nano3", "sft", "--config-dir"), "--config-dir needs a folder"),
        (("nano3", "sft", "--config-dir", "nowhere"), "is not a folder"),
        (("apply", "nowhere.json"), "can't be read"),
        (("runs", "show", "nothing"), "no run 'nothing'"),
        (("runs", "cancel", "nothing"), "no run 'nothing'"),
        (("artifacts", "show", "nothing"), "no artifact 'nothing'"),
        (("lineage", "../x"), "can't be an artifact name"),
        (("env", "show", "x"), "unknown profile 'x'"),
    ],
)
def test_a_wrong_request_ends_with_2_and_one_message(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    assert text in refused(tmp_path, *arguments)


def test_broken_env_toml_and_bad_output_folder(tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text("[desk\n")
    assert "env.toml can't be read" in refused(tmp_path, "env", "list")
    (tmp_path / "env.toml").write_text("[artifacts]\noutput = '/proc/nowhere'\n")
    assert "can't be written" in refused(tmp_path, *PREP)


def test_help_lists_what_exists(tmp_path: Path) -> None:
    assert "nano3" in nemotron(tmp_path, "--help").stdout
    assert "data prep sft" in nemotron(tmp_path, "nano3", "--help").stdout
    (tmp_path / "env.toml").write_text('[my-desk]\nexecutor = "local"\n')
    text = nemotron(tmp_path, "nano3", "sft", "--help").stdout
    assert "my-desk" in text and "tiny" in text and "Examples" in text


def test_a_dry_run_writes_nothing_and_is_what_then_runs(tmp_path: Path) -> None:
    shown = nemotron(tmp_path, *PREP, "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    assert list(tmp_path.iterdir()) == []
    plan = tmp_path / "plan with space.json"
    assert nemotron(tmp_path, *PREP, "--plan-out", str(plan)).returncode == 0
    applied = nemotron(tmp_path, "apply", str(plan))
    assert applied.returncode == 0, applied.stdout + applied.stderr
    saved = json.loads(plan.read_text())
    run_dir = Path(saved["run_dir"])
    for stage in saved["stages"]:
        for name, text in stage["launch"]["files"].items():
            assert (run_dir / stage["name"] / "files" / name).read_text() == text
    again = nemotron(tmp_path, "apply", str(plan))
    assert again.returncode == 2, "a plan that has run does not run twice"
    assert "has run" in again.stderr


def test_running_following_and_reading_back(tmp_path: Path) -> None:
    done = nemotron(tmp_path, *PREP)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    (run,) = json.loads(nemotron(tmp_path, "runs", "list", "--json").stdout)
    assert run["state"] == "succeeded"
    shown = json.loads(nemotron(tmp_path, "runs", "show", run["id"][-8:], "--json").stdout)
    (stage,) = shown["stages"]
    assert stage["results"]["rows_read"] == 60
    name = f"{stage['outputs']['data']['name']}:v1"
    assert nemotron(tmp_path, "artifacts", "show", name, "--verify").returncode == 0
    for form in ("tree", "mermaid", "json"):
        assert "sample:largest_of_three" in nemotron(tmp_path, "lineage", name, "--format", form).stdout.replace(
            "#58;", ":"
        ).replace("#95;", "_")
    again = nemotron(tmp_path, *PREP)
    assert again.returncode == 0 and "nothing to run" in again.stdout
    forced = nemotron(tmp_path, *PREP, "--force", "--json")
    assert json.loads(forced.stdout)["stages"][0]["outputs"]["data"]["version"] == 2


def test_a_failed_job_ends_with_1_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": 5}\nnot json\n')
    done = nemotron(
        tmp_path,
        "nano3",
        "data",
        "prep",
        "sft",
        "data.sources=[{path: bad.jsonl}]",
        "data.tokenizer=tiny",
        "data.on_bad_row=fail",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed" in done.stdout and "bad.jsonl" in done.stdout and "log:" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    (run,) = json.loads(nemotron(tmp_path, "runs", "list", "--json").stdout)
    assert run["state"] == "failed"
    assert nemotron(tmp_path, "artifacts", "list", "--json").stdout.strip() == "[]"


def slow_prep(tmp_path: Path, mode: tuple[str, ...]) -> list[str]:
    (tmp_path / "env.toml").write_text('[desk]\nexecutor = "local"\ngrace_seconds = 2\n')
    row = json.dumps(
        {"messages": [{"role": "user", "content": "hi " * 50}, {"role": "assistant", "content": "yes " * 50}]}
    )
    (tmp_path / "many.jsonl").write_text((row + "\n") * SLOW_ROWS)
    overrides = ["data.sources=[{path: many.jsonl}]", "data.tokenizer=tiny"]
    return [sys.executable, "-m", "nemotron_recipes", "nano3", "data", "prep", "sft", *overrides, *mode]


def processes_of(run: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NEMOTRON_RUN_ID") == run and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_for_start(tmp_path: Path) -> dict:
    for _ in range(300):
        runs = json.loads(nemotron(tmp_path, "runs", "list", "--json").stdout or "[]")
        if runs and runs[0]["stages"][0]["state"] == "running":
            return runs[0]
        time.sleep(0.2)
    raise AssertionError("the run never started")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_stops_the_whole_tree_and_is_recorded(tmp_path: Path, number: signal.Signals) -> None:
    follower = subprocess.Popen(
        slow_prep(tmp_path, ()), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    run = wait_for_start(tmp_path)
    assert processes_of(run["id"])
    follower.send_signal(number)
    output, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130, output
    assert b"cancelled" in output
    assert processes_of(run["id"]) == []
    shown = json.loads(nemotron(tmp_path, "runs", "show", run["id"], "--json").stdout)
    assert shown["state"] == "cancelled"
    assert json.loads(nemotron(tmp_path, "artifacts", "list", "--json").stdout) == []


def test_batch_outlives_its_terminal_and_can_be_followed_and_cancelled(tmp_path: Path) -> None:
    terminal = subprocess.run(
        slow_prep(tmp_path, ("--batch", "desk")),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert terminal.returncode == 0, terminal.stderr
    run = wait_for_start(tmp_path)
    assert f"nemotron runs logs -f {run['id']}" in terminal.stdout
    follower = subprocess.Popen(
        [sys.executable, "-m", "nemotron_recipes", "runs", "logs", "-f", run["id"]],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert follower.stdout and follower.stdout.read(1), "it follows"
    cancelled = nemotron(tmp_path, "runs", "cancel", run["id"])
    assert cancelled.returncode == 0 and "cancelled" in cancelled.stdout, cancelled.stderr
    assert follower.wait(timeout=60) == 130
    assert processes_of(run["id"]) == []
    assert nemotron(tmp_path, "runs", "cancel", run["id"]).returncode == 2


def test_ctrl_c_on_a_follower_leaves_the_run_alone(tmp_path: Path) -> None:
    subprocess.run(
        slow_prep(tmp_path, ("-b", "desk")), cwd=tmp_path, env=environment(), check=True, capture_output=True
    )
    run = wait_for_start(tmp_path)
    follower = subprocess.Popen(
        [sys.executable, "-m", "nemotron_recipes", "runs", "logs", "-f", run["id"]],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert follower.stdout and follower.stdout.read(1), "it follows"
    follower.send_signal(signal.SIGINT)
    assert follower.wait(timeout=60) == 130
    assert processes_of(run["id"]), "the run goes on"
    assert nemotron(tmp_path, "runs", "cancel", run["id"]).returncode == 0


def test_a_run_whose_launcher_was_killed_is_not_running_forever(tmp_path: Path) -> None:
    subprocess.run(
        slow_prep(tmp_path, ("-b", "desk")), cwd=tmp_path, env=environment(), check=True, capture_output=True
    )
    run = wait_for_start(tmp_path)
    for process in processes_of(run["id"]):
        process.kill()
    shown = json.loads(nemotron(tmp_path, "runs", "show", run["id"], "--json").stdout)
    assert shown["state"] == "lost"


def test_hostile_names_reach_the_worker_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "a $(touch pwned) 'q' \"d\" ünï\nline"
    folder.mkdir()
    row = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]})
    (folder / "${rows}; $(id).jsonl").write_text((row + "\n") * 3)
    done = nemotron(
        folder,
        "nano3",
        "data",
        "prep",
        "sft",
        "data.sources=[{path: '\\${rows}; $(id).jsonl', split: train}]",
        "data.tokenizer=tiny",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "pwned").exists()
    (run,) = json.loads(nemotron(folder, "runs", "list", "--json").stdout)
    assert run["stages"][0]["results"]["rows_read"] == 3


def test_help_and_dry_run_import_neither_torch_nor_nemo_run(tmp_path: Path) -> None:
    for arguments in (
        ("--help",),
        ("nano3", "sft", "--help"),
        ("nano3", "pipe", "-c", "tiny", "--dry-run"),
        ("runs", "list"),
    ):
        command = [sys.executable, "-X", "importtime", "-m", "nemotron_recipes", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
        loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
        assert loaded.isdisjoint({"torch", "nemo_run", "transformers", "trl", "datasets"})
        assert "click" in loaded
