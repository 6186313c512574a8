"""What our code asks of a Slurm, and what that answered: recorded, and replayed (tests/recorded/slurm-*/answers.json).

tests/helpers/slurm_scenes.py makes the jobs that are asked about.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from nemotron_recipes.errors import NemotronError, UserError
from nemotron_recipes.executors.remote import there
from nemotron_recipes.executors.slurm import control, doctor, facts, limits
from nemotron_recipes.executors.slurm import site as slurm_site
from nemotron_recipes.executors.slurm.profile import SlurmProfile

TOKEN = "nemotron=recorded"
# What sbatch refuses, or takes, in so many words: name -> flags.
REFUSED = {
    "partition": ("--partition=nowhere",),
    "account": ("--account=nobody",),
    "qos": ("--qos=nowhere",),
    "node": ("--nodelist=node99",),
    "gpus": ("--gpus-per-node=9",),
    "time": ("--time=never",),
    "flag": ("--no-such-flag=1",),
    "limit": ("--qos=once",),
}


@dataclass
class Recording:
    """By how the cluster was then: what was asked and answered, and the jobs, name -> id. logs: of jobs, by name."""

    version: str
    jobs: dict[str, dict[str, str]] = field(default_factory=dict)
    scenes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        tree = {"version": self.version, "jobs": self.jobs, "scenes": self.scenes, "logs": self.logs}
        text = json.dumps(tree, indent=1, ensure_ascii=False)
        text = re.sub(r"/tmp/[\w-]+", "/jobs", re.sub(r"OS=Linux .+? (?=RealMemory=)", "OS=Linux ", text))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    @classmethod
    def load(cls, path: Path) -> Recording:
        return cls(**json.loads(path.read_text()))


class Replay:
    """Answers as a recorded Slurm did; AssertionError for a question that was not asked of it."""

    def __init__(self, recording: Recording, scene: str):
        self.answers = {tuple(each["argv"]): each for each in recording.scenes[scene]}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        control._silent.clear()
        with mock.patch.object(there, "run", self._run), mock.patch.object(there, "user", lambda: "root"):
            yield

    def _run(self, argv: Sequence[str], seconds: float, more: Any = None) -> dict[str, Any]:
        assert tuple(argv) in self.answers, f"nobody asked the recorded Slurm for {argv}"
        return {key: value for key, value in self.answers[tuple(argv)].items() if key != "argv"}


def ask_all(jobs: dict[str, str], scene: str) -> dict[str, Any]:
    """Every question that our code has for a cluster, by our code; what it made of the answers, or the error.

    Where slurmctld is dead each takes seconds: then it is one question for each command.
    """
    control._silent.clear()
    found: dict[str, Any] = {}

    def asked(name: str, question: Callable[[], Any]) -> None:
        try:
            found[name] = question()
        except (NemotronError, UserError) as error:
            found[name] = error

    asked("states", lambda: control.job_states(jobs.values()))
    asked("site", slurm_site.read_site)
    silent = scene == "without slurmctld"
    for name, flags in REFUSED.items():
        if name == "partition" or not silent:
            asked(f"sbatch {name}", lambda flags=flags: there.run(["sbatch", *flags, "--wrap=true"], 60.0))
    if silent:
        return found
    for name, job in jobs.items():
        asked(f"state of {name}", lambda job=job: control.job_state(job))
        state = found[f"state of {name}"]
        if isinstance(state, control.JobState) and state.waiting:
            asked(f"wait of {name}", lambda state=state: facts.wait_of("stage", state))
    asked("unknown job", lambda: control.job_state("99999999"))
    asked("unknown jobs", lambda: control.job_states(["99999998", "99999999"]))
    asked("named", lambda: control.jobs_named("named", "nobody-has-this-name"))
    asked("token", lambda: control.job_with(TOKEN, "named", []))
    asked("no token", lambda: control.job_with("nemotron=other", "named", []))
    if isinstance(site := found["site"], slurm_site.Site):
        asked("policy", lambda: limits.read_policy(site))
    asked("queued", lambda: control.ask("squeue", "--me", "--array", "--noheader", "--format=%a|%q"))
    asked("cancel", lambda: control.scancel(["99999999"]))
    asked("doctor", lambda: doctor.examine(SlurmProfile(executor="slurm")))
    return found


@contextmanager
def recorded(recording: Recording, scene: str, folder: Path) -> Iterator[None]:
    """Everything that our code asks within the block goes into the recording; what jobs leave goes to `folder`."""
    answers: dict[tuple[str, ...], dict[str, Any]] = {}
    run = there.run

    def listening(argv: Sequence[str], seconds: float, more: Any = None) -> dict[str, Any]:
        said = run(argv, seconds, more)
        answers.setdefault(tuple(argv), {"argv": [*argv], **said})
        return said

    before = Path.cwd()
    os.chdir(folder)  # sbatch without --output writes beside its submitter
    try:
        with mock.patch.object(there, "run", listening):
            yield
    finally:
        os.chdir(before)
    text = json.dumps([*answers.values()], ensure_ascii=False)
    text = text.replace(str(folder), "/cluster").replace(socket.gethostname(), "login")
    recording.scenes[scene] = json.loads(re.sub(r"/[^\s\"=,:]*/root/usr/lib", "/usr/lib", text))
