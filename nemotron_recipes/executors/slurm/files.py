"""The files in a run folder through which a submission, its jobs and later readers speak. Standard library only.

<stage>/logs/requeue-JOB                       the first launcher's wish to have the job put back into the queue
submission.json                                what was handed to Slurm: the stages in order, the attempt of each
secrets.json                                   mode 0600; gone once the run has ended
<stage>/files/launch.json, sbatch.sh           what each node's launcher reads, and the script that starts it
<stage>/files/array.sh                         the script of an array that does parts of the stage's work beforehand
<stage>/logs/slurm-JOB.out, nodes-JOB.out      what the script and the launchers print; of an array, JOB is JOB_TASK
<stage>/logs/attempt-N/launcher.log            what the processes of the first node print outside their own logs
<stage>/logs/attempt-N/launcher.node-K.log     the same of another node
<stage>/logs/attempt-N/node-K.json             how node K ended
<stage>/logs/attempt-N/meeting.json            the port of the first node where all meet
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nemotron_recipes.rundir import RunDir, StageDir, read_json, write_sealed

LAUNCH = "launch.json"
SCRIPT = "sbatch.sh"
ARRAY = "array.sh"
CODE = "code"  # below a stage: where NeMo-Run starts tasks; a link to the run's SNAPSHOT
SNAPSHOT = "code"  # below the run: the sources that travel with it


@dataclass(frozen=True)
class NodeReport:
    """How one node's part of an attempt ended; written by its launcher, last of all.

    time            seconds since the epoch
    overdue         its launcher asked it to stop, since the time was nearly up
    stopped         it was asked to stop before its processes ended: what follows is no cause of anything
    problem         why it started nothing; "" when it did
    rank            the worker that failed first there, as torchrun says, with its exit code
    """

    node: int
    host: str
    time: float
    exit_code: int
    stopped: bool = False
    problem: str = ""
    rank: int | None = None
    rank_exit_code: int | None = None
    overdue: bool = False

    @property
    def code(self) -> int:
        """The worker's own exit code, where torchrun named it."""
        return self.exit_code if self.rank_exit_code is None else self.rank_exit_code


def submission(run: RunDir) -> Path:
    return run.path / "submission.json"


def secrets(run: RunDir) -> Path:
    return run.path / "secrets.json"


def script(stage: StageDir) -> Path:
    return stage.files / SCRIPT


def array_script(stage: StageDir) -> Path:
    return stage.files / ARRAY


def launcher_log(stage: StageDir, attempt: int, node: int) -> Path:
    """Of the processes of one node."""
    return stage.launcher_log(attempt, node)


def batch_log(stage: StageDir, job: str) -> Path:
    """What the batch script printed; `%j` as the job gives the name that sbatch is told."""
    return stage.path / "logs" / f"slurm-{job}.out"


def nodes_log(stage: StageDir, job: str) -> Path:
    """What the launchers of all nodes printed."""
    return stage.path / "logs" / f"nodes-{job}.out"


def requeue_wish(stage: StageDir, job: str) -> Path:
    """The first launcher's wish to have the job put back: the events that say so. A later attempt removes it."""
    return stage.path / "logs" / f"requeue-{job}"


def meeting(stage: StageDir, attempt: int) -> Path:
    """At which port of the first node the nodes meet, with the job that holds it."""
    return stage.logs(attempt) / "meeting.json"


def write_report(stage: StageDir, attempt: int, report: NodeReport) -> None:
    write_sealed(stage.logs(attempt) / f"node-{report.node}.json", asdict(report), kind="node")


def read_reports(stage: StageDir, attempt: int) -> list[NodeReport]:
    """The reports that are there, by node."""
    found = [read_json(path) for path in stage.logs(attempt).glob("node-*.json")]
    return sorted((NodeReport(**tree) for tree in found if tree), key=lambda report: report.node)


def first_failure(reports: list[NodeReport]) -> NodeReport | None:
    """The node that failed first without having been asked to stop: the others fell over it."""
    failed = [report for report in reports if report.exit_code and not report.stopped]
    return min(failed, key=lambda report: report.time, default=None)


def answer(stage: StageDir, token: str) -> Path:
    """Below this name lies what sbatch said to the attempt with that token."""
    return stage.path / "submission" / token.rpartition("=")[2]


def attempts_text(attempts: Mapping[str, int]) -> str:
    """What is about to be submitted: the stages in order, each with its attempt."""
    return json.dumps({"stages": [*attempts.items()]}) + "\n"


def attempts(run: RunDir) -> dict[str, int]:
    """Stage -> first attempt of the newest submission, in the order of the stages; each requeue of a job adds one."""
    return dict((read_json(submission(run)) or {}).get("stages", []))
