"""A submitted Slurm run as NeMo-Run's own `nemo experiment list|status|cancel` expects it (0.11.1).

NeMo-Run renders our scripts but does not submit them, so it would know of no experiment. This writes what its
`Experiment.run` would have left: the experiment's folder, and the line in `.slurm_jobs` by which a job is found.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nemotron_recipes.executors import nemo_adapter


def home_of(run_dir: Path) -> Path:
    """NEMORUN_HOME where the user has set it, else a folder of the run: what `nemo` must be told to find it."""
    return Path(os.environ.get(nemo_adapter.HOME_ENV) or run_dir / "nemo_run")


def experiment_id(run_id: str) -> str:
    """`nano3-sft-tiny_0a64a012`: NeMo-Run takes what stands before the last underscore for the title."""
    title, _, digits = run_id.rpartition("-")
    return f"{title}_{digits}"


def note(run_dir: Path, run_id: str, jobs: Mapping[str, str], scripts: Mapping[str, str]) -> None:
    """Write it. jobs: stage -> job; scripts: stage -> its sbatch script. OSError: it can't be written."""
    home = home_of(run_dir)
    name = experiment_id(run_id)
    with nemo_adapter.imported():
        import nemo_run
        from nemo_run.run.torchx_backend.schedulers import slurm as scheduler
        from torchx.specs import AppState

        experiment = nemo_run.Experiment(
            name.rpartition("_")[0],
            id=name,
            base_dir=str(home),
            log_level="WARNING",
            clean_mode=True,  # nothing is printed here
            enable_goodbye_message=False,
            skip_status_at_exit=True,
            serialize_metadata_for_scripts=False,
        )
        tunnel = nemo_run.LocalTunnel(job_dir=experiment._exp_dir)
        scheduler.SLURM_JOB_DIRS = str(home / ".slurm_jobs")  # NeMo-Run has made it from the home at its import
        with experiment:
            for stage, job in jobs.items():
                executor = nemo_run.SlurmExecutor(account=None, tunnel=tunnel)
                experiment.add(nemo_run.Script(path=scripts[stage]), executor=executor, name=stage)
                added = experiment._jobs[-1]
                added.launched, added.handle, added.state = True, f"slurm_tunnel://nemo_run/{job}", AppState.SUBMITTED
                added.executor.create_job_dir()
                scheduler._save_job_dir(job, added.executor.job_dir, tunnel, "sbatch*.out")
            nemo_adapter.save(experiment)
            experiment._save_jobs()
            experiment._save_tunnels()
            Path(experiment._exp_dir, "__main__.py").unlink(missing_ok=True)  # `nemo` would run our command line again
