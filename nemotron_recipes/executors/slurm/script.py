"""From a stage of a Plan to the bytes of its Slurm job. Pure; nothing here depends on a machine that has Slurm."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemotron_recipes.executors import torchrun
from nemotron_recipes.executors.slurm import container as slurm_container
from nemotron_recipes.executors.slurm import files as slurm_files
from nemotron_recipes.executors.slurm import requeue as slurm_requeue
from nemotron_recipes.executors.slurm.container import HF_HOME, Container
from nemotron_recipes.executors.slurm.launch import HOSTS_ENV
from nemotron_recipes.executors.slurm.profile import SBATCH_FIELDS, SlurmProfile
from nemotron_recipes.pulse import limits_of
from nemotron_recipes.rundir import DEADLINE_ENV, RUN_ID_ENV, RunDir, StageDir
from nemotron_recipes.spec import Plan, RenderedStage, StagePlan, Tree, to_json

LAUNCHER = "nemotron_recipes.executors.slurm.launch"
ARRAY_LAUNCHER = "nemotron_recipes.executors.slurm.array"
ARRAY_SUFFIX = ".array"  # no stage has a dot in its name
DEPENDENCY = "--dependency="
_OURS = (HOSTS_ENV, DEADLINE_ENV, slurm_requeue.JOB_END_ENV, slurm_requeue.WISH_ENV, slurm_requeue.ENDED_AS_ENV)
RESERVED_ENV = (*_OURS, "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")


def profile_of(stage: StagePlan) -> SlurmProfile:
    """The stage's placement as a profile again."""
    place = stage.placement
    known = {key: value for key, value in place.options.items() if key in SlurmProfile.model_fields}
    return SlurmProfile.model_validate(
        {**known, "nodes": place.nodes, "nproc_per_node": place.nproc_per_node, "secrets": list(place.secrets)}
    )


def rendered_stage(plan: Plan, stage: StagePlan, first: bool) -> RenderedStage:
    """Files (the plan's own, launch.json, sbatch.sh), what the launcher starts, and the environment that it adds."""
    folder, profile = StageDir(Path(stage.directory)), profile_of(stage)
    container = slurm_container.container_of(plan, stage, profile)
    argv, env = worker_argv(stage), environment(plan, stage)
    launch = to_json(_launch(plan, stage, argv, env)) + "\n"
    files = {str(folder.files / name): text for name, text in stage.launch.files.items()}
    files[str(folder.files / slurm_files.LAUNCH)] = launch
    files[str(slurm_files.script(folder))] = _script(plan, stage, container, first)
    if tasks_of(stage):
        files[str(slurm_files.array_script(folder))] = _script(plan, stage, container, first, array=True)
    notes = slurm_container.notes(stage, profile, container)
    return RenderedStage(stage.name, files, argv, env, stage.directory, profile.workdir, notes)


def submit_commands(plan: Plan, stages: list[StagePlan]) -> tuple[tuple[str, ...], ...]:
    """One sbatch per stage; each but the first waits for the one before, whose job has no id yet. A stage with an array
    has one more, before its own, which waits until no task of the array is left, however they ended. The first waits
    for the run that must be over before, if there is one, however that ended."""
    commands = []
    before: tuple[str, ...] = ()
    if plan.after is not None and stages:  # a flag of the command line takes the place of the script's
        own = profile_of(stages[0]).dependency
        before = (*((own,) if own else ()), f"afterany:{job_symbol(last_of(plan.after))}")
    for stage in stages:
        profile, folder = profile_of(stage), StageDir(Path(stage.directory))
        requeue = "--requeue" if profile.max_requeues else "--no-requeue"
        tasks = tasks_of(stage)
        if tasks:  # a task may go back as often as it likes: it never does anything twice
            comment = _comment(profile, array_of(stage.name))
            flags = ("--parsable", "--requeue", f"--array=0-{tasks - 1}", comment, *_after(*before))
            commands.append(_command(profile, flags, slurm_files.array_script(folder)))
            if profile.dependency and not before:  # a flag of the command line takes the place of the script's
                before = (profile.dependency,)
            before = (*before, f"afterany:{job_symbol(array_of(stage.name))}")
        words = ("--parsable", requeue, _comment(profile, stage.name), *_after(*before))
        commands.append(_command(profile, words, slurm_files.script(folder)))
        before = (f"afterok:{job_symbol(stage.name)}",)
    return tuple(commands)


def tasks_of(stage: StagePlan) -> int:
    """How many tasks of an array do parts of the stage's work before its own job; 0: none."""
    return (profile_of(stage).data_array or 0) if stage.launch.part_module else 0


def array_of(stage: str) -> str:
    """What the array of a stage is called where jobs are listed by stage. No stage has a dot in its name."""
    return stage + ARRAY_SUFFIX


def resolved(command: Sequence[str], jobs: Mapping[str, str], tokens: Mapping[str, str]) -> list[str]:
    """The command with its token and the ids of earlier jobs; no dependency on a stage that needs no job any more."""
    argv = []
    for word in command:
        if word.startswith("--comment="):
            for name, token in tokens.items():
                word = word.replace(token_symbol(name), token)
        if word.startswith(DEPENDENCY):
            known = {job_symbol(name): job for name, job in jobs.items()}
            wanted = [part.partition(":") for part in word.removeprefix(DEPENDENCY).split(",")]
            found = [f"{kind}{colon}{known.get(which, which)}" for kind, colon, which in wanted
                     if which in known or not which.startswith("<")]  # fmt: skip
            if not found:
                continue
            word = DEPENDENCY + ",".join(found)
        argv.append(word)
    return argv


def _after(*jobs: str) -> tuple[str, ...]:
    return (DEPENDENCY + ",".join(jobs), "--kill-on-invalid-dep=yes") if jobs else ()


def _comment(profile: SlurmProfile, name: str) -> str:
    return f"--comment={profile.comment + ' ' if profile.comment else ''}{token_symbol(name)}"


def _command(profile: SlurmProfile, flags: Sequence[str], script: Path) -> tuple[str, ...]:
    removed = {flag.lstrip("-").replace("_", "-") for flag in profile.remove}
    return ("sbatch", *(flag for flag in flags if flag[2:].partition("=")[0] not in removed), str(script))


def waits_for_ever(command: tuple[str, ...]) -> bool:
    """Whether the job would stay in the queue when the one that it needs has failed: its site knows no flag."""
    needs = any(word.startswith(DEPENDENCY) and "afterok:" in word for word in command)
    return needs and not any(word.startswith("--kill-on-invalid-dep") for word in command)


def job_symbol(stage: str) -> str:
    """Stands for the id of a stage's job until sbatch has named it."""
    return f"<job of {stage}>"


def last_of(run_dir: str) -> str:
    """What `job_symbol` names of a run that must be over first."""
    return f"{Path(run_dir).name}/last"


def token_symbol(stage: str) -> str:
    """Stands for what tells one attempt of a stage's job from all others; made when it is submitted."""
    return f"<token of {stage}>"


def job_name(plan: Plan, stage: StagePlan) -> str:
    """Names the run and the stage, so that a job can be found by it."""
    return f"{profile_of(stage).job_name_prefix}{plan.id}.{stage.name}"


def shell_command(plan: Plan, stage: StagePlan, job: str, command: Sequence[str]) -> list[str]:
    """A step inside a running job, on its first node: in a second instance of its image, with its mounts."""
    profile = profile_of(stage)
    container = slurm_container.container_of(plan, stage, profile)
    argv = ["srun", f"--jobid={job}", "--overlap", "--nodes=1", "--ntasks=1", f"--chdir={plan.run_dir}"]
    if os.isatty(0):
        argv.append("--pty")
    if container:
        argv += [f"--container-image={container.image}", f"--container-workdir={plan.run_dir}", *container.flags]
        argv.append(f"--container-mounts={','.join(map(str, container.mounts))}")
        if profile.container_env:
            argv.append(f"--container-env={','.join(profile.container_env)}")
    removed = {flag.lstrip("-").replace("_", "-") for flag in profile.remove}
    return [*(word for word in argv if word.lstrip("-").partition("=")[0] not in removed), *command]


def worker_argv(stage: StagePlan) -> tuple[str, ...]:
    """What the launcher starts on every node."""
    launch, python = stage.launch, profile_of(stage).interpreter
    if launch.launcher == "plain":
        return (python, "-m", launch.module, *launch.args)
    log_dir = Path(stage.directory) / "logs" / "torchrun"
    return torchrun.command(
        launch.module, launch.args, stage.placement.nproc_per_node, log_dir, stage.placement.nodes, python
    )


def environment(plan: Plan, stage: StagePlan) -> dict[str, str]:
    """Added to what the job inherits, by the launcher: no shell ever reads these, and no image's own stand above them.

    Only PYTHONPATH is put before what is there, which an image, or a module of the site, may need.
    """
    profile = profile_of(stage)
    cache = slurm_container.hf_home(profile)
    return {
        "PYTHONSAFEPATH": "1",  # `-m` looks for modules in the environment alone, not in the stage's folder
        "PYTHONUNBUFFERED": "1",
        **slurm_container.home(profile),
        **stage.launch.env,
        **profile.env,
        **({HF_HOME: cache} if cache else {}),
        RUN_ID_ENV: plan.id,
    }


def _launch(plan: Plan, stage: StagePlan, argv: tuple[str, ...], env: dict[str, str]) -> Tree:
    tasks = tasks_of(stage)
    part: Tree = {}
    if tasks and stage.launch.part_module:
        words = (profile_of(stage).interpreter, "-m", stage.launch.part_module, *stage.launch.args)
        part = {"part_argv": list(words), "parts": tasks}
    return {
        **part,
        "run_dir": plan.run_dir,
        "stage": stage.name,
        "fingerprint": stage.fingerprint,
        "nodes": stage.placement.nodes,
        "gpus_per_node": stage.placement.options.get("gpus_per_node"),
        "launcher": stage.launch.launcher,
        "max_requeues": profile_of(stage).max_requeues,
        "save_margin": profile_of(stage).save_margin,
        "watchdog": profile_of(stage).watchdog,
        "stall": limits_of(stage.placement.options),
        "argv": list(argv),
        "env": env,
        "cwd": stage.directory,
        "workdir": profile_of(stage).workdir,
    }


def _script(plan: Plan, stage: StagePlan, container: Container | None, first: bool, array: bool = False) -> str:
    """Of the stage's job; or of the array that does parts of its work: whose tasks Slurm alone puts back."""
    from nemotron_recipes.executors.slurm.nemo_run import BatchJob, batch_script

    profile, folder = profile_of(stage), StageDir(Path(stage.directory))
    job_id = "%A_%a" if array else "%j"
    goes_back = array or profile.max_requeues > 0
    fields = {name: getattr(profile, name) for name in SBATCH_FIELDS if name != "dependency"}
    if goes_back and profile.open_mode is None:
        fields["open_mode"] = "append"  # else each attempt would wipe out what the one before said
    fields["partition"] = profile.partition_for(plan.request.mode)
    fields = {name: value for name, value in fields.items() if value is not None and value is not False}
    parameters = {key: value for key, value in profile.additional_parameters.items() if value is not False}
    if profile.dependency and first:  # the others wait for the one before, on their command lines
        parameters["dependency"] = profile.dependency
    job = BatchJob(
        name=array_of(job_name(plan, stage)) if array else job_name(plan, stage),
        folder=stage.directory,
        output=str(slurm_files.batch_log(folder, job_id)),
        srun_output=str(slurm_files.nodes_log(folder, job_id)),
        fields=fields,
        parameters=parameters,
        setup=_setup(profile, RunDir(Path(plan.run_dir)), folder, 0 if array else profile.max_requeues),
        srun_args=_srun_args(profile, container, goes_back),
        command=(
            *(profile.interpreter, "-m", ARRAY_LAUNCHER if array else LAUNCHER),
            str(folder.files / slurm_files.LAUNCH),
        ),
        image=container.image if container else None,
        mounts=tuple(map(str, container.mounts)) if container else (),
        container_env=tuple(profile.container_env),
        remove=tuple(profile.remove),
    )
    return batch_script(job)


def _setup(profile: SlurmProfile, run: RunDir, folder: StageDir, max_requeues: int) -> tuple[str, ...]:
    """Not traced: the lines may read keys. A line that fails ends the job; what is exported reaches every node."""
    lines = ["set +vx"]
    if profile.setup:
        lines += ["set -e", *profile.setup, "set +e"]
    requeue = slurm_requeue.setup_lines(run, folder, max_requeues)
    return (*lines, f'export {HOSTS_ENV}="${{nodes[*]}}"', *requeue)


def _srun_args(profile: SlurmProfile, container: Container | None, goes_back: bool) -> tuple[str, ...]:
    args = []
    if profile.cpus_per_task:  # Slurm 22.05 and newer don't take it over from the job
        args.append(f"--cpus-per-task={profile.cpus_per_task}")
    args += container.flags if container else ()
    if goes_back:
        args.append("--open-mode=append")
    return (*args, *profile.srun_args)
