"""The frozen values that flow through a command, in the order in which they come to be.

Standard library only: the CLI, the planner, executors, and the worker inside a container all read these.
Every value is plain data (dataclasses of str, int, float, bool, None, tuple, dict), so a Plan is JSON.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Tree = dict[str, Any]  # a plain nested config: str keys; dict, list, str, int, float, bool or None

# What an executor can say of a submitted run. "lost": nobody runs it and nobody recorded an end.
Liveness = Literal["queued", "running", "ended", "lost"]


@dataclass(frozen=True)
class Request:
    """A parsed command line. `words` is the path below `conf/recipe/<family>`, e.g. ("data", "prep", "sft")."""

    family: str
    words: tuple[str, ...]
    config: str = "default"
    mode: Literal["here", "run", "batch"] = "here"
    profile: str | None = None
    overrides: tuple[str, ...] = ()
    config_dirs: tuple[str, ...] = ()
    force: bool = False  # ignore caches and earlier results
    offline: bool = False  # never ask the network, not even to pin a remote reference
    smoke: int = 0  # only so many steps, to project the whole run from; 0: the whole run
    cwd: str = "."  # absolute; relative paths and env.toml are looked for from here

    @property
    def stage(self) -> str:
        return "-".join(self.words)


@dataclass(frozen=True)
class Producer:
    """Who made, or will make, an artifact: `fingerprint` says what, `run`/`stage` which, `slot` which output of it."""

    fingerprint: str
    run: str
    stage: str
    slot: str


@dataclass(frozen=True)
class Artifact:
    """An input pinned to something immutable, or pending: the output of a stage that has not run yet.

    source    what is set
    store     name, version, uri (folder), digest, producer
    path      uri (absolute path or glob), digest of the contents
    remote    uri (s3://..., gs://...; file, folder or glob), digest of what the store says of its files
    hub       name (org/repo), revision (commit; None = UNPINNED, refused at submission)
    wandb     name (entity/project/name), revision (vN; None = UNPINNED), W&B's digest
    builtin   name ("tiny", "sample:largest_of_three"); its content follows from the code and the config
    pending   name, producer; the worker that runs later finds and verifies it by producer
    """

    source: Literal["store", "path", "remote", "hub", "wandb", "builtin", "pending"]
    kind: str  # "model", "tokenizer", "data", "checkpoint"
    name: str = ""
    version: int | None = None
    uri: str = ""
    digest: str = ""
    revision: str | None = None
    producer: Producer | None = None

    @property
    def label(self) -> str:
        """For people: NAME:vN, a path, org/name@commit, builtin:NAME or NAME (pending)."""
        if self.source == "store":
            return f"{self.name}:v{self.version}"
        if self.source in ("path", "remote"):
            return self.uri
        if self.source == "hub":
            return f"hf://{self.name}@{self.revision or 'UNPINNED'}"
        if self.source == "wandb":
            return f"wandb:{self.name}:{self.revision or 'UNPINNED'}"
        if self.source == "builtin":
            return self.name if ":" in self.name else f"builtin:{self.name}"
        assert self.producer is not None
        return f"{self.name} (pending: output '{self.producer.slot}' of {self.producer.stage})"

    @property
    def identity(self) -> str:
        """What enters a fingerprint. A pending output and the version it became are the same thing."""
        if self.producer is not None:
            return f"{self.producer.fingerprint}/{self.producer.slot}"
        if self.source == "hub":
            return f"hub:{self.name}@{self.revision}"
        if self.source == "wandb":
            return f"wandb:{self.name}@{self.digest}"
        if self.source == "builtin":
            return f"builtin:{self.name}"
        return self.digest

    @classmethod
    def from_tree(cls, tree: Tree) -> Artifact:
        """The inverse of `asdict`. TypeError for a key that isn't a field."""
        made = tree.get("producer")
        return cls(**{**tree, "producer": Producer(**made) if made else None})


@dataclass(frozen=True)
class Output:
    """A named result that the stage registers in the store when it succeeds."""

    slot: str  # "data", "model"
    name: str  # artifact name in the store
    kind: str


@dataclass(frozen=True)
class StageSpec:
    """All that a backend knows of a stage when it says what to launch."""

    config: Tree  # validated and complete
    inputs: dict[str, Artifact]  # config key -> what it is pinned to
    outputs: tuple[Output, ...]
    run: Tree  # the worker file's `run` section (docs/contracts.md)
    nproc: int = 1  # processes in all
    resume_from: str | None = None  # a whole checkpoint to continue from


@dataclass(frozen=True)
class Launch:
    """What runs, before an executor says how: files to write (name -> text), and a module with its arguments."""

    module: str
    args: tuple[str, ...]
    files: dict[str, str]
    launcher: Literal["plain", "torchrun"] = "plain"
    env: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # for people who read the plan: no problem, but good to know
    # A module that does part I of N of the work beforehand when it gets the same arguments and `--part I/N`. What it
    # leaves behind is taken over, what it doesn't is done by `module`: it may be killed, or never be started.
    part_module: str | None = None
    writes_together: bool = False  # its ranks write into one checkpoint: all nodes must see the run folder
    # What the module needs of an image, beside Python's own library, tried before anything is queued: MODULE,
    # MODULE:ATTRIBUTE, or PACKAGE/PATH for a file, from the package's folder on; A|B: one of them will do.
    imports: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)  # package -> the version that values were checked against


@dataclass(frozen=True)
class Placement:
    """Where it runs. `options` are the executor's own validated fields; secrets are names, never values."""

    executor: str
    profile: str | None
    nodes: int
    nproc_per_node: int
    options: Tree = field(default_factory=dict)
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Which layer set a value: kind is "group", "config", "profile" or "command line"; source names it."""

    kind: str
    source: str

    def __str__(self) -> str:
        return f"{self.kind} {self.source}".strip()


@dataclass(frozen=True)
class Code:
    """The code that runs: digest of the package's source files, and git's view where there is one.

    uncommitted: changed and untracked files of the checkout (they travel as they are on disk, if they are sources)
    left_behind: files of the package that don't travel, each with the reason
    """

    digest: str
    version: str
    git_commit: str | None = None
    git_diff_digest: str | None = None
    uncommitted: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()


@dataclass(frozen=True)
class StagePlan:
    """One stage: `fingerprint` covers the config without placement, the inputs' identities and the code."""

    name: str  # unique in the plan, e.g. "data-prep-sft"
    words: tuple[str, ...]
    config_name: str
    kind: Literal["data_prep", "train", "convert"]
    method: str
    config: Tree  # the validated envelope, complete
    changed: dict[str, Origin]  # leaf -> layer, for leaves that differ from the recipe's base
    inputs: dict[str, Artifact]  # config key that holds the reference -> what it is pinned to
    outputs: tuple[Output, ...]
    launch: Launch
    placement: Placement
    directory: str  # the stage's folder in the run folder
    fingerprint: str
    reused: Artifact | None = None  # set when an earlier run already made this stage's output
    resume_from: str | None = None  # a whole checkpoint (iter_NNNNNNN) to continue from
    stands_for: Tree = field(default_factory=dict)  # of a smoke run: fingerprint and length of the whole one
    estimate: Tree = field(default_factory=dict)  # what it will take (planning/estimate.py); {} where nothing trains


@dataclass(frozen=True)
class Plan:
    """All of a command. `id` is the run id: minted once, before anything is rendered."""

    id: str
    family: str
    title: str  # what was asked: "nano3 pipe -c tiny"
    request: Request
    stages: tuple[StagePlan, ...]
    code: Code
    run_dir: str
    store: str
    created: str  # ISO 8601, UTC
    version: int = 1
    rerun_of: str | None = None  # the run whose plan this is once more
    sweep: str | None = None  # the sweep that it belongs to
    after: str | None = None  # folder of the run that must be over before this one starts, however it ended
    wandb: dict[str, str] = field(default_factory=dict)  # env.toml's [wandb]: where the run is mirrored to


@dataclass(frozen=True)
class RenderedStage:
    """Bytes and argv of one stage. `argv` runs in `cwd` with `env` added to the inherited environment; no shell.

    workdir   instead of `cwd`, the stage's folder, where a profile names another one in a container
    notes     (name, text) of what else the executor made of the settings, for people
    elsewhere host -> argv that runs there at the same time, where one stage runs on several machines
    """

    name: str
    files: dict[str, str]  # absolute path -> text
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    workdir: str | None = None
    notes: tuple[tuple[str, str], ...] = ()
    elsewhere: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """Everything that a submission sends: the stages that run (reused ones left out) and the submitting commands.

    A command of `submit` may hold words in <angle brackets>: what is known only when an earlier one has answered.
    """

    stages: tuple[RenderedStage, ...]
    submit: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class JobHandle:
    """How to find a submitted run again, from any later process. `native` belongs to the executor."""

    executor: str
    run: str
    run_dir: str
    native: Tree


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is fine, and what was found. No secret's value."""

    topic: str
    state: str  # "ok", "warning" or "problem"
    text: str


@dataclass(frozen=True)
class Examination:
    """What the machine or cluster behind a profile can do, and a profile that would fit it ({}: none to suggest)."""

    findings: tuple[Finding, ...]
    suggestion: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class JobFacts:
    """What a scheduler says of one stage's job, now. Times are seconds since the epoch; None: it doesn't say.

    state    its own word: PENDING, RUNNING, ...; waiting and active say what that means
    reason   its own word for why the job waits or ended, and `words` the same for people
    start    when the job began, or is expected to
    """

    stage: str
    job: str
    state: str
    active: bool
    waiting: bool
    reason: str = ""
    words: str = ""
    start: float | None = None
    nodes: str = ""


@dataclass(frozen=True)
class Outlook:
    """A submitted run as its executor sees it: what it comes to, the jobs, and why nobody could be asked, if so.

    accepted   False: it can't be told whether the scheduler has accepted all of it, and `unreachable` says why
    """

    alive: Liveness
    jobs: tuple[JobFacts, ...] = ()
    unreachable: str = ""
    accepted: bool = True


@dataclass(frozen=True)
class Wait:
    """Why a job has not started: the scheduler's code, the same in words, the limit that it hits, what would fit."""

    stage: str
    job: str
    reason: str
    words: str
    limits: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()
    start: float | None = None


def to_json(value: Any, indent: int | None = 2) -> str:
    """Stable JSON of any value here: sorted keys, UTF-8 text left as it is."""
    data = asdict(value) if hasattr(value, "__dataclass_fields__") else value
    return json.dumps(data, indent=indent, sort_keys=True, ensure_ascii=False)


def sha256_text(text: str) -> str:
    """`sha256:<hex>` of the UTF-8 bytes; lone surrogates are kept apart rather than refused."""
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
