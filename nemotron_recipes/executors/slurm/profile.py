"""What a Slurm profile, or `run.*` on the command line, may set: the fields of NeMo-Run's `SlurmExecutor`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nemotron_recipes.executors.images.enroot import Unusable, image_for_pyxis, parse_mount

# Fields with two names: NeMo-Run's, and the one that this project uses for the same thing everywhere.
# One Slurm task runs per node whatever is asked for; `ntasks_per_node` has always meant the processes of a node.
OTHER_NAMES = {
    "ntasks_per_node": "nproc_per_node",
    "container_mounts": "mounts",
    "setup_lines": "setup",
    "env_vars": "env",
}

# Fields of NeMo-Run's `SlurmExecutor` that are not to be set here, each with why, and what to set.
_ARRAY = (
    "one run folder holds one run: for 1-N%1, the same work going on in N jobs one after another, set max_requeues; "
    "for different work side by side start a run each; for data prep, set data_array"
)
_ONE_COMMAND = "a stage is one command on all its nodes, of one kind"
NOT_HERE = {
    "array": _ARRAY,
    "dependencies": 'set dependency = "afterok:JOB"',
    "dependency_type": 'set dependency = "afterok:JOB"',
    "het_group_indices": _ONE_COMMAND,
    "heterogeneous": _ONE_COMMAND,
    "job_details": "names and logs are the run folder's; job_name_prefix is yours",
    "launcher": "the recipe decides whether a stage runs under torchrun",
    "memory_measure": "put a command that measures into setup",
    "monitor_group_job": _ONE_COMMAND,
    "monitor_group_job_wait_time": _ONE_COMMAND,
    "packager": "the run takes the sources along as they lie on disk",
    "poll_estimated_start_time": "--run shows the estimate",
    "ray_template": _ONE_COMMAND,
    "retries": "set max_requeues",
    "torchrun_nproc_per_node": "set nproc_per_node",
    "wait_time_for_group_job": _ONE_COMMAND,
}

# Fields that become an `#SBATCH` line of the same name. What is not set has no line: the site's own default holds.
SBATCH_FIELDS = (
    *("account", "partition", "qos", "time", "nodes", "gpus_per_node", "gpus_per_task", "gres", "cpus_per_task"),
    *("cpus_per_gpu", "mem", "mem_per_cpu", "mem_per_gpu", "exclusive", "constraint", "exclude", "segment", "network"),
    *("signal", "comment", "open_mode", "dependency"),
)

# sbatch flags that are not to be had through `additional_parameters`, each with what to set instead.
OWN_FLAGS = {
    "array": f"nothing: {_ARRAY}",
    "nodes": "nodes",
    "ntasks": "nodes and nproc_per_node",
    "ntasks-per-node": "nproc_per_node",
    "job-name": "job_name_prefix",
    "output": "nothing: logs go to the run folder",
    "error": "nothing: logs go to the run folder",
    "chdir": "nothing: a stage runs in its own folder",
    "export": "env and secrets",
    "wrap": "nothing: the script is the one that is shown",
    "parsable": "nothing",
    "wait": "--run instead of --batch",
    "requeue": "max_requeues",
    "no-requeue": "max_requeues",
}

OWN_TARGET = "/nemo_run"  # where NeMo-Run mounts a stage's folder, and starts its tasks

Positive = Annotated[int, Field(ge=1)]


class SlurmProfile(BaseModel):
    """A Slurm cluster. A field that is not set leaves no trace in the script."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    NOT_HERE: ClassVar[dict[str, str]] = NOT_HERE

    executor: Literal["slurm"] = "slurm"
    nodes: Positive = 1
    nproc_per_node: Positive = 1  # processes that train together on a node: one per GPU; also called ntasks_per_node

    gpu: str | None = None  # one of nemotron_recipes/sizing/gpus.toml: what a plan must fit into
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None  # the same for a GPU that is not there
    account: str | None = None
    partition: str | None = None
    run_partition: str | None = None  # instead of `partition` for --run
    batch_partition: str | None = None  # instead of `partition` for --batch
    qos: str | None = None
    time: str | None = None  # limit, as sbatch wants it: MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS, ...
    gpus_per_node: Positive | None = None
    gpus_per_task: Positive | None = None  # a task is a node here
    gres: str | None = None
    cpus_per_task: Positive | None = None  # a task is a node here: all the cores that its processes share
    cpus_per_gpu: Positive | None = None
    mem: str | None = None  # per node; "0": all
    mem_per_cpu: str | None = None
    mem_per_gpu: str | None = None
    exclusive: bool | str | None = None
    constraint: str | None = None
    exclude: str | None = None
    segment: Positive | None = None  # nodes per NVLink block
    network: str | None = None
    signal: str | None = None  # e.g. "TERM@300": ask to stop that many seconds before the limit
    max_requeues: Annotated[int, Field(ge=0)] = 0  # how often a job may go back into the queue before its work is done
    # Seconds before the limit by which all must be saved; unset: 60, and of short jobs a tenth of their time.
    save_margin: Annotated[float, Field(ge=0)] | None = None
    # What the launchers do when no rank comes further: collect Python's stacks of all ranks, then let it be, end the
    # run, or put the job back into the queue. Unset: nothing.
    watchdog: Literal["dump", "cancel", "requeue"] | None = None
    stall_factor: Annotated[float, Field(gt=0)] | None = None  # for how many median steps nothing may move; unset: 20
    stall_seconds: Annotated[float, Field(gt=0)] | None = None  # at least so many seconds; unset: 120
    # Data prep: so many tasks of an array, each like the stage's own job, share the shards; that job merges after them.
    data_array: Annotated[int, Field(ge=2)] | None = None
    dependency: str | None = None  # of the first stage's job, e.g. "afterok:1234"
    comment: str | None = None
    open_mode: Literal["append", "truncate"] | None = None
    job_name_prefix: str = ""
    additional_parameters: dict[str, str | int | bool] = {}  # any other flag of sbatch; true: a flag without value
    srun_args: list[str] = []
    remove: list[str] = []  # flags of sbatch or srun that this site does not know
    setup: list[str] = []  # lines of shell before srun, on the first node and outside the container: module load, ...

    container: bool | None = None  # false: bare metal although an image is named
    container_image: str | None = None  # /PATH/IMAGE.sqsh or REGISTRY/IMAGE:TAG; without one, stages run on bare metal
    container_name: str | None = None  # kept on the nodes under that name, and used again: the image is then ignored
    mounts: list[str] = []  # SOURCE:TARGET[:OPTION+OPTION]; what a stage writes and reads is mounted in any case
    container_env: list[str] = []  # names that the job inherits and that must win over the image's own
    container_workdir: str | None = None  # in the container: where the processes start; unset: the stage's folder
    container_mount_home: bool = False
    container_remap_root: bool | None = None  # unset, as the three below: what the site's enroot is set to
    container_writable: bool | None = None
    container_entrypoint: bool | None = None
    hf_cache: str | None = None  # HF_HOME of the stages, in a folder that all nodes see; unset: yours, if you have one
    python: str | None = None  # interpreter on the nodes; unset: this one, or python3 in a container

    env: dict[str, str] = {}  # set for every stage; kept in the run folder in plain text
    secrets: list[str] = []  # names of variables that must be set where the run is started; the job reads them from a
    # file of mode 0600 that goes with the run's end

    # Where sbatch is: unset on this machine, else on a login node that `ssh HOST` reaches (docs/slurm.md, over SSH).
    tunnel: Literal["ssh"] | None = None
    host: str | None = None  # as ssh knows it: a name, or a Host of your ssh configuration
    user: str | None = None
    identity: str | None = None  # a key file; unset: what your ssh configuration and agent have
    remote_job_dir: str | None = None  # full path there, on a file system that all nodes see: runs and the store
    remote_python: str = "python3"  # on the login node: 3.10 or newer, the standard library is enough
    ssh_config: str | None = None  # instead of ~/.ssh/config

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, given: Any) -> Any:
        """Fields under their other names; both given is fine only when they agree."""
        if not isinstance(given, dict):
            return given
        given = dict(given)
        for other, name in OTHER_NAMES.items():
            if other not in given:
                continue
            value = given.pop(other)
            if other == "setup_lines" and isinstance(value, str):
                value = value.splitlines()
            if name in given and given[name] != value:
                raise ValueError(f"{other} and {name} are one thing and differ: {value!r} and {given[name]!r}")
            given[name] = value
        for name in ("time", "mem", "mem_per_cpu", "mem_per_gpu"):  # `run.time=30` on a command line is a number
            if type(given.get(name)) is int:
                given[name] = str(given[name])
        return given

    @property
    def image(self) -> str | None:
        """The image that stages run in, as it is written; None on bare metal."""
        return None if self.container is False else self.container_image

    @property
    def workdir(self) -> str | None:
        """Where processes start instead of the stage's folder; None on bare metal."""
        return self.container_workdir if self.image else None

    @property
    def interpreter(self) -> str:
        """What is started on the nodes."""
        return self.python or ("python3" if self.image or self.tunnel else sys.executable)

    def partition_for(self, mode: str) -> str | None:
        """The partition of a run that is followed (`run`), or left alone (`batch`)."""
        special = {"run": self.run_partition, "batch": self.batch_partition}.get(mode)
        return special or self.partition


def contradictions(profile: SlurmProfile) -> Iterator[tuple[str, str, str]]:
    """(field, what, fix) for what no cluster could make sense of."""
    for key in profile.additional_parameters:
        flag = key.replace("_", "-")
        if flag in OWN_FLAGS:
            yield f"additional_parameters.{key}", f"--{flag} is decided by the executor", f"set {OWN_FLAGS[flag]}"
        elif flag.replace("-", "_") in SBATCH_FIELDS:
            yield f"additional_parameters.{key}", f"--{flag} has a field of its own", f"set {flag.replace('-', '_')}"
        elif not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
            yield f"additional_parameters.{key}", f"{key!r} is no flag of sbatch", "give its long name without dashes"
    limit = limit_seconds(profile.time)
    if limit is not None and profile.save_margin is not None and profile.save_margin >= limit:
        yield "save_margin", f"{profile.save_margin:g} s before the end of {limit} s leaves no time to work", "lower it"
    if profile.data_array and "?" in (profile.dependency or ""):
        yield (
            "data_array",
            'a dependency of alternatives ("?") can\'t be joined with the wait for an array',
            "use commas",
        )
    if profile.watchdog == "requeue" and not profile.max_requeues:
        yield "watchdog", "it is to put the job back, but max_requeues is 0", "set max_requeues"
    yield from _container(profile)
    yield from tunnel_problems(profile)
    for field in ("setup", "srun_args"):
        for text in getattr(profile, field):
            if field == "srun_args" and "\n" in text:
                yield field, f"{text!r} holds a line break", "take it out"
    for name, value in _one_liners(profile):
        if any(character in value for character in "\n\r\\"):
            yield name, f"{value!r} holds a character that no #SBATCH line can carry", "take it out"


def tunnel_problems(profile: SlurmProfile) -> Iterator[tuple[str, str, str]]:
    """The same of how the cluster is reached: what can be said before it is."""
    given = [name for name in ("host", "user", "identity", "remote_job_dir", "ssh_config") if getattr(profile, name)]
    if profile.tunnel is None:
        for name in given:
            yield name, f"{name} is for a cluster that is reached over SSH", 'set tunnel = "ssh", or take it out'
        return
    for name in ("host", "remote_job_dir"):
        if name not in given:
            yield name, f'tunnel = "ssh" needs {name}', f"set {name}"
    if profile.host and (profile.host.startswith("-") or not profile.host.isprintable() or " " in profile.host):
        yield "host", f"{profile.host!r} is no name of a host", "give it as ssh takes it"
    if profile.remote_job_dir and not re.fullmatch(r"/[^\0-\x1f:,%\\\\]*", profile.remote_job_dir):
        what = f"{profile.remote_job_dir!r} is no full path that Slurm and containers can take"
        yield "remote_job_dir", what, "write it from / on, without : , % and backslashes"


def _container(profile: SlurmProfile) -> Iterator[tuple[str, str, str]]:
    if profile.container and not profile.container_image:
        yield "container", "container = true, but no image is named", "set container_image"
    if profile.container_name is not None and not profile.container_image:
        yield "container_name", "a name, but no image", "set container_image"
    try:
        image_for_pyxis(profile.container_image) if profile.container_image is not None else None
    except Unusable as error:
        yield "container_image", error.what, error.fix
    for mount in profile.mounts:
        try:
            target = parse_mount(mount).target
        except Unusable as error:
            yield "mounts", error.what, error.fix
        else:
            if target.rstrip("/") in ("", OWN_TARGET):
                yield "mounts", f"{mount!r} covers what the job itself needs", "choose another path in the container"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*(:(auto|create|exec|no_exec))?", profile.container_name or "x"):
        yield "container_name", f"{profile.container_name!r} is no name of a container", "use letters, digits, _ . -"
    for name, path in (("container_workdir", profile.container_workdir), ("hf_cache", profile.hf_cache)):
        if path is not None and not path.startswith("/"):
            yield name, f"{path!r} is not a full path", "jobs run in folders of their own: write it from / on"
    if profile.hf_cache and profile.env.get("HF_HOME", profile.hf_cache) != profile.hf_cache:
        yield "hf_cache", "hf_cache and HF_HOME under env are one thing and differ", "take one of them out"
    for name in profile.container_env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield "container_env", f"{name!r} is no name for an environment variable", "use letters, digits and _"


def limit_seconds(time: str | None) -> int | None:
    """A time limit in seconds; None where there is none, or it is for sbatch to say what is wrong with it.

    https://slurm.schedmd.com/sbatch.html#OPT_time
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time or "")
    if not found:
        return None
    days, first, second, third = (int(text) if text else None for text in found.groups())
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)


def _one_liners(profile: SlurmProfile) -> Iterator[tuple[str, str]]:
    for name in (*SBATCH_FIELDS, "job_name_prefix", "run_partition", "batch_partition", "container_image"):
        value = getattr(profile, name)
        if isinstance(value, str):
            yield name, value
    for key, given in profile.additional_parameters.items():
        if isinstance(given, str):
            yield f"additional_parameters.{key}", given
