"""NeMo-Run's part of a Slurm job: the sbatch script, rendered by its own `SlurmExecutor` and `SlurmBatchRequest`.

With nemo_adapter.py the only importer of NeMo-Run. What 0.11.1 would add unasked is kept out here: its time limit of
ten minutes, its open mode, a job name made of the account, log names with shell in them, and a `set -x` that goes on
over the lines of the user.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from nemotron_recipes.executors import nemo_adapter

# On bare metal NeMo-Run replaces this text anywhere in the finished script, in the user's own paths as well.
_RUNDIR = "/nemo_run"
_MASK = "/@nemo@run@"  # nothing in it makes shlex quote

_SHELL_WORD = r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"])+"
# Flags of srun whose values NeMo-Run writes as a word of their own.
_TWO_WORDS = ("output", "chdir", "container-image", "container-mounts", "container-workdir", "container-env")


@dataclass(frozen=True)
class BatchJob:
    """One sbatch script. Texts may hold anything but line breaks, unless the field says otherwise."""

    name: str
    folder: str  # absolute; NeMo-Run starts tasks in its folder `code`
    output: str  # log of the batch script, as `--output` wants it (%j is the job's id)
    srun_output: str
    fields: dict[str, Any]  # of SlurmExecutor: nodes, time, ...; what is missing has no line
    parameters: dict[str, Any]  # further sbatch flags
    setup: tuple[str, ...]  # lines of shell before srun
    srun_args: tuple[str, ...]
    command: tuple[str, ...]  # what each task runs
    image: str | None = None
    mounts: tuple[str, ...] = ()
    container_env: tuple[str, ...] = ()
    remove: tuple[str, ...] = field(default=())  # names of flags to leave out


def batch_script(job: BatchJob) -> str:
    """The text of the script; the same for the same job. Imports NeMo-Run (a second); writes nothing."""
    with nemo_adapter.imported():
        from nemo_run.core.execution.slurm import SlurmBatchRequest, SlurmExecutor, SlurmJobDetails
        from nemo_run.core.tunnel.client import LocalTunnel

        class Details(SlurmJobDetails):
            """Job name and log files as they are given."""

            stdout = property(lambda self: _masked(job.output))
            srun_stdout = property(lambda self: _word(job.srun_output))

        parent, _, name = job.folder.rpartition("/")
        given = {key: _masked(value) for key, value in job.fields.items()}
        executor = SlurmExecutor(
            **{"account": None, "time": None, "open_mode": None, **given},
            ntasks_per_node=1,
            job_name_prefix="unused, but without one the account is made a name of",
            job_details=Details(job_name=_masked(job.name), folder=_masked(job.folder)),
            tunnel=LocalTunnel(job_dir=_word(parent)),
            additional_parameters=_masked(job.parameters),
            srun_args=[_word(argument) for argument in job.srun_args],
            setup_lines="\n".join(_masked(line) for line in job.setup),
            container_image=_word(job.image) if job.image else None,
            container_mounts=[_word(mount) for mount in job.mounts],
            container_env=list(job.container_env) or None,
        )
        executor.job_dir = f"{_word(parent)}/{_word(name)}"
        text = SlurmBatchRequest(
            launch_cmd=["sbatch"],
            jobs=[_masked(job.name)],
            command_groups=[[_word(word) for word in job.command]],
            executor=executor,
            max_retries=0,
            extra_env={},
            launcher=None,
        ).materialize()
    return _without(str(text).replace(_MASK, _RUNDIR), job.remove)


def _word(text: str) -> str:
    """A word, or a part of one, of the srun line: NeMo-Run quotes none of them (its `noquote` is plain `str`)."""
    return shlex.quote(str(_masked(text)))


def _masked(value: Any) -> Any:
    """Text in which NeMo-Run finds nothing to replace; anything else as it is."""
    if isinstance(value, dict):
        return {key: _masked(inner) for key, inner in value.items()}
    return value.replace(_RUNDIR, _MASK) if isinstance(value, str) else value


def _without(script: str, flags: tuple[str, ...]) -> str:
    """The script less `#SBATCH` lines and srun arguments of those names."""
    lines = []
    for line in script.split("\n"):
        for flag in flags:
            name = flag.lstrip("-").replace("_", "-")
            if re.match(rf"#SBATCH --{re.escape(name)}(=|$)", line):
                break
            if line.startswith("srun "):
                value = f"[ =]{_SHELL_WORD}" if name in _TWO_WORDS else f"(={_SHELL_WORD})?"
                line = re.sub(rf" --{re.escape(name)}{value}(?= )", "", line)
        else:
            lines.append(line)
    return "\n".join(lines)
