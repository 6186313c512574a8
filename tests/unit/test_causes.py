"""Why runs failed and why jobs wait, recognised from what was really printed (tests/unit/evidence)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.causes import CAUSES, diagnose, recognised
from nemotron_recipes.cli import explain as explained
from nemotron_recipes.executors.slurm import reasons
from nemotron_recipes.executors.slurm.reasons import limit_of, measured, words_of
from nemotron_recipes.rundir import RunDir, append_event

EVIDENCE = Path(__file__).parent / "evidence"
TEXTS = sorted(path for path in EVIDENCE.glob("*.txt") if "22.05" not in path.name)
NAMES = [cause.name for cause in CAUSES]
CODES = (EVIDENCE / "limit-codes-22.05.txt").read_text().split()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_what_was_printed_is_recognised(path: Path) -> None:
    cause = recognised(path.read_text())
    assert cause is not None
    assert max((name for name in NAMES if path.stem.startswith(name)), key=len) == cause.name


def test_a_run_that_went_well_has_no_cause() -> None:
    text = (
        "step 12/50 [####--] loss 1.2345 lr 5.0e-03 0.11 s/step, 0:00:04 left\nNCCL version 2.27.5\nsaved iter_0000012"
    )
    assert recognised(text) is None


@pytest.mark.parametrize("code", CODES)
def test_every_code_of_a_limit_is_put_into_words(code: str) -> None:
    limit = limit_of(code)
    assert limit is not None
    assert code not in words_of(code)
    assert limit.of_one_job == (limit.per in ("Job", "Node"))
    assert limit.field.startswith(("Grp", "Max", "Min"))


@pytest.mark.parametrize(
    ("code", "field", "resource", "per"),
    [
        ("QOSMaxJobsPerUserLimit", "MaxJobsPU", "", "User"),
        ("QOSMaxGRESPerUser", "MaxTRESPU", "gres/gpu", "User"),
        ("QOSMaxWallDurationPerJobLimit", "MaxWallPJ", "", "Job"),
        ("QOSGrpGRES", "GrpTRES", "gres/gpu", "all"),
        ("QOSMinGRES", "MinTRESPJ", "gres/gpu", "Job"),
        ("AssocGrpCPUMinutesLimit", "GrpTRESMins", "cpu", "all"),
        ("AssocMaxJobsLimit", "MaxJobs", "", "User"),
        ("MaxGRESPerAccount", "MaxTRESPA", "gres/gpu", "Account"),
        ("AssocMaxNodePerJobLimit", "MaxTRESPJ", "node", "Job"),
    ],
)
def test_where_a_limit_is_written(code: str, field: str, resource: str, per: str) -> None:
    limit = limit_of(code)
    assert limit is not None
    assert (limit.field, limit.resource, limit.per) == (field, resource, per)


def test_an_unknown_code_is_said_as_it_is() -> None:
    assert words_of("SomethingNew") == "Slurm says SomethingNew"
    assert words_of("ReqNodeNotAvail, UnavailableNodes:node3") == reasons.WORDS["ReqNodeNotAvail"][0]


@pytest.mark.parametrize(
    ("code", "qos", "allowed", "used"),
    [
        ("QOSMaxJobsPerUserLimit", "small", "1", "1"),
        ("QOSMaxGRESPerUser", "small", "2", "2"),
        ("QOSMaxWallDurationPerJobLimit", "small", "10", None),
        ("QOSMaxNodePerJobLimit", "big", "2", None),
        ("QOSGrpGRES", "big", "3", "2"),
    ],
)
def test_limits_with_their_use_as_slurm_writes_them(code: str, qos: str, allowed: str, used: str | None) -> None:
    text = (EVIDENCE / "assoc-mgr-22.05.txt").read_text()
    limit = limit_of(code)
    assert limit is not None
    (found,) = measured(limit, {"UserId": "root(0)", "Account": "lab", "QOS": qos}, text)
    assert (found.allowed, found.used) == (allowed, used)
    assert found.where == f"QOS {qos} {limit.field}"
    assert measured(limit, {"UserId": "root(0)", "Account": "lab", "QOS": "normal"}, text) == []


def failed_run(tmp_path: Path, **logs: str) -> RunDir:
    run = RunDir(tmp_path)
    for name, text in logs.items():
        file = run.stage("sft").logs(1) / f"{name.replace('_', '-')}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    append_event(run.events, "finished", state="failed", stage="sft", cause="exit code 1, see launcher.log")
    return run


def test_the_cause_comes_before_what_followed_from_it(tmp_path: Path) -> None:
    """Rank 1 ran out of memory; rank 0, whose log is read first, waited for it until NCCL's time was up."""
    out_of_memory, waited = (EVIDENCE / "cuda-out-of-memory.txt").read_text().splitlines()
    found = diagnose(failed_run(tmp_path, rank_0=f"hello\n{waited}\n", rank_1=f"hello\n\n{out_of_memory}\n"), "sft", 1)
    assert found.cause is not None
    assert found.cause.name == "cuda-out-of-memory"
    (line,) = found.evidence
    assert (Path(line.file).name, line.number) == ("rank-1.log", 3)


def test_what_nobody_knows_is_said_to_be_unknown(tmp_path: Path) -> None:
    run = failed_run(tmp_path, rank_0="it went wrong somehow\n")
    failure = {"time": 1.0, "rank": 3, "host": "node2", "error": "ValueError", "message": "ValueError: boom"}
    path = run.stage("sft").failure(1, 3)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**failure, "exit_code": 1, "lines": ["  in train", "ValueError: boom"]}))
    found = diagnose(run, "sft", 1)
    assert found.cause is None
    text = "\n".join(explained._diagnosis(found))
    assert "not known why" in text
    assert "rank 3 on node2: ValueError: boom" in text
    assert "exit code 1, see launcher.log" in text


def test_a_line_of_a_log_can_not_steer_the_terminal(tmp_path: Path) -> None:
    run = failed_run(tmp_path, rank_0="\x1b[2Jpyxis: failed to import docker image\x07\n")
    (line,) = diagnose(run, "sft", 1).evidence
    assert line.text.isprintable()
