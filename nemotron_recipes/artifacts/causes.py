"""Why a run failed: one table of causes, each recognised by the very lines that Slurm, Pyxis, torch and others print.

What is recognised is shown with the lines that prove it; what is not is said to be unknown, with what there is. Where
several causes are found, the one that stands first in the table explains the others: a rank that ran out of memory
makes the others wait until NCCL's time is up. Reads only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemotron_recipes import closing
from nemotron_recipes.container_words import BAD_MOUNT, CONTAINER, MISSING_IMAGE, MISSING_PYXIS, line_pattern
from nemotron_recipes.errors import printable
from nemotron_recipes.rundir import Damaged, RunDir, StageDir, read_jsonl
from nemotron_recipes.spec import Tree

TAIL_BYTES = 256 * 1024  # of a log's end: what ended a process stands there
RANKS_READ = 64  # logs of ranks that are read; a run of a thousand has said it in one of them
SHOWN_LINES = 6


@dataclass(frozen=True)
class Cause:
    """A way to fail. `pattern` is searched in single lines of logs; `fix` says what to do about it."""

    name: str
    words: str
    pattern: str
    fix: str


# The first that is found counts. Slurm's texts: slurmstepd/mgr.c, srun/libsrun/launch.c, 20.11 to 25.x; of
# containers: container_words.py; torch: ProcessGroupNCCL.cpp, ProcessGroupGloo, TCPStore.cpp, CUDACachingAllocator.cpp.
CAUSES = (
    Cause(
        *(MISSING_PYXIS, "Slurm has no Pyxis here: it knows no flag for container images"),
        line_pattern(MISSING_PYXIS),
        "use a cluster with Pyxis, or container = false in the profile (bare metal)",
    ),
    Cause(
        *(BAD_MOUNT, "a mount of the container does not exist on the node, or can't be made"),
        line_pattern(BAD_MOUNT),
        "look at `mounts` in the profile: each HOST part must exist on every node",
    ),
    Cause(
        *(MISSING_IMAGE, "the container image could not be had"),
        line_pattern(MISSING_IMAGE),
        "look at container_image: name, tag, and the credentials of its registry; a file begins with / or ./",
    ),
    Cause(
        *(CONTAINER, "the container did not start"),
        line_pattern(CONTAINER),
        "Pyxis's own lines say why; try the image with srun --container-image by hand",
    ),
    Cause(
        *("cuda-out-of-memory", "a GPU's memory was exhausted"),
        r"CUDA out of memory|OutOfMemoryError: (CUDA|HIP)|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
        r"Cuda failure 2 'out of memory'",
        "lower the micro batch size or the sequence length, or spread the model over more GPUs",
    ),
    Cause(
        *("out-of-memory", "the node's memory, or the job's share of it, was exhausted"),
        r"oom[-_ ]kill|[Ee]xceeded (job |step )?memory limit|"
        r": Out Of Memory$|[Oo]ut[- ]of[- ]memory (handler|killer)|Out of memory: Killed process|"
        r"DataLoader worker \(pid.*killed by signal: Killed|DefaultCPUAllocator: can't allocate memory|"
        r"^(numpy\S*)?MemoryError|ended as OUT_OF_MEMORY|docker says OOMKilled",
        "raise `mem` (docker: --memory in options), lower the micro batch size, or use fewer loader processes",
    ),
    Cause(
        *("shared-memory", "the container's shared memory (/dev/shm) is too small"),
        r"insufficient shared memory|DataLoader worker \(pid.*Bus error|unable to (mmap|allocate shared memory)",
        "give the container more shared memory (docker: shm_size), or use fewer loader processes",
    ),
    Cause(
        *("disk-full", "a disk or a quota is full"),
        r"No space left on device|Disk quota exceeded|Errno 28|Errno 122",
        "make room, or let [artifacts] output and store lie elsewhere; checkpoint.keep bounds what checkpoints take",
    ),
    Cause(
        *("hardware", "a GPU failed"),
        r"uncorrectable (ECC|NVLink) error|CUDA error: (an illegal instruction|unspecified launch failure)|"
        r"Xid \(PCI|GPU has fallen off the bus|CUDA error: no CUDA-capable device",
        "leave the node out (run.exclude) and tell the site; go on from the last checkpoint with train.resume=true",
    ),
    Cause(
        *("node-failure", "a node failed"),
        r"DUE TO NODE FAILURE|[Nn]ode failure on|ended as NODE_FAIL|no word from \S+.*: it may be down",
        "start it again, with train.resume=true to go on from the last checkpoint; max_requeues does so by itself",
    ),
    Cause(
        *("memory-watchdog", "the machine's memory was nearly used up, and the run was stopped before it would hang"),
        r"stopped before the machine ran out of memory",
        "lower the micro batch size or the pack size, or train adapters; train.resume=true goes on from a checkpoint",
    ),
    Cause(
        *("host-gone", "a host of the run could not be reached any more"),
        r"can't be reached any more \(",
        "see whether it is up; train.resume=true goes on from the last checkpoint",
    ),
    Cause(
        *("link-down", "the network between the hosts was gone"),
        r"the network between the hosts was gone",
        "look at cable and ports (nemotron doctor PROFILE measures it); train.resume=true goes on from a checkpoint",
    ),
    Cause(
        *("time-limit", "the time limit was reached"),
        r"DUE TO TIME LIMIT|the time limit (of \S+ was|is) reached|ended as TIMEOUT",
        "raise `time`, or let the job go on by itself with max_requeues; train.resume=true goes on where it ended",
    ),
    Cause(
        *("preempted", "another job took the nodes"),
        r"DUE TO PREEMPTION|ended as PREEMPTED",
        "start it again with train.resume=true, or set max_requeues",
    ),
    Cause(
        *("stalled", "no rank came further, and the watchdog ended it"),
        r"^STALLED: ",
        "the stacks of all ranks lie in the stage's folder stacks/",
    ),
    Cause(
        *("download", "something could not be had over the network from there"),
        r"(Connection|Proxy|SSL)Error.*huggingface\.co|couldn't connect to '?https://huggingface\.co|"
        r"LocalEntryNotFoundError|Max retries exceeded|Connection error, and we cannot find",
        "fetch it before, where there is a network, and let the profile's env name the cache (HF_HOME)",
    ),
    Cause(
        *("rendezvous", "the processes did not find one another when they started"),
        r"(client|server) socket has (timed out|failed)|Rendezvous\w*Error|failed to listen on any local|"
        r"[Nn]ame or service not known|Temporary failure in name resolution|gaierror|on which the nodes would meet|"
        r"failed to (connect|recv)\w* to .*TCPStore|store(::| )\w* .*timed out",
        "see that the nodes reach one another by the names that Slurm gives them, and that no firewall is between them",
    ),
    Cause(
        *("collective-time-out", "ranks waited for others in a collective step until its time was up"),
        r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for (recv|send) operation|"
        r"NCCL (operation|communicator) .*(timed out|timeout)|collective.*timed? ?out|Timeout at NCCL work",
        "the rank that is not named here hung or was slow: look at its log; `watchdog` in the profile collects stacks",
    ),
    Cause(
        *("nccl", "NCCL failed"),
        r"ncclSystemError|ncclInternalError|ncclUnhandledCudaError|ncclRemoteError|NCCL error",
        "NCCL_DEBUG=INFO in the profile's env shows which network it uses; NCCL_SOCKET_IFNAME chooses it",
    ),
    Cause(
        *("cuda", "CUDA does not work there"),
        r"CUDA driver version is insufficient|no kernel image is available|The NVIDIA driver on your system is too old|"
        r"Torch not compiled with CUDA enabled",
        "use an image that fits the node's driver and GPU",
    ),
    Cause(
        *("package", "a package is missing where the stage runs"),
        r"ModuleNotFoundError: No module named|needs the package '",
        "install it where the stage runs (`python` and `setup` in the profile), or use an image that has it",
    ),
    Cause(
        *("damaged", "what it was to read has changed or is damaged"),
        r"has changed: its content is (sha256:|missing)|the list of the files of \S+ is damaged|"
        r"(error|failed|input \S+): (the manifest of )?\S+ is damaged: ",
        "bring back what is named there, make it again, or start a new run with what is there now",
    ),
    Cause(
        *("permission", "a file or folder may not be read or written there"),
        r"^(\S+: )?PermissionError|Read-only file system|\[Errno 13\]",
        "see who owns it, and what `mounts` makes of it",
    ),
)


@dataclass(frozen=True)
class Line:
    """A line of a file; `number` counts from 1, 0 where the file is so long that only its end was read."""

    file: str
    number: int
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """What ended a stage. `cause` is None when nobody knows; `evidence` then is what there is."""

    stage: str
    cause: Cause | None
    first: str  # the first failing rank's own words; "" where none could say any
    evidence: tuple[Line, ...]
    logs: tuple[str, ...]


def diagnose(run: RunDir, stage: str, attempt: int) -> Diagnosis:
    """Search everything that an attempt of a stage has left behind."""
    folder = StageDir(run.stage(stage).path)
    failure = folder.first_failure(attempt)
    first = f"rank {failure['rank']} on {failure['host']}: {failure['message']}" if failure else ""
    files = list(_files(run, folder, attempt, failure["rank"] if failure else None))
    told = [*_of_events(run, stage), *_of_failure(folder, attempt, failure)]
    found = _first_cause([told, *(_tail(file) for file in files)])
    logs = tuple(str(file) for file in files if file.stat().st_size)
    if found is not None:
        cause, lines = found
        return Diagnosis(stage, cause, first, tuple(lines), logs)
    evidence = told or [line for file in files[:2] for line in list(_tail(file))[-SHOWN_LINES:]]
    return Diagnosis(stage, None, first, tuple(evidence[-2 * SHOWN_LINES :]), logs)


def recognised(text: str) -> Cause | None:
    """The cause that a text speaks of; the first of the table where it speaks of several."""
    lines = [Line("", number, line) for number, line in enumerate(text.splitlines(), 1)]
    found = _first_cause([lines])
    return found[0] if found else None


def _first_cause(sources: list[list[Line]]) -> tuple[Cause, list[Line]] | None:
    for cause in CAUSES:
        pattern = re.compile(cause.pattern)
        lines = [line for source in sources for line in source if pattern.search(line.text)]
        if lines:
            unique = {line.text: line for line in reversed(lines)}  # many ranks say the same
            return cause, [line for line in lines if unique[line.text] is line][:SHOWN_LINES]
    return None


def _of_events(run: RunDir, stage: str) -> list[Line]:
    """What the launcher, or Slurm, has said of the end."""
    ends = [
        (number, event)
        for number, event in enumerate(read_jsonl(run.events), 1)
        if event["event"] == "finished" and event.get("cause") and event.get("stage") in (stage, None)
    ]
    return [Line(str(run.events), number, line) for number, event in ends[-1:] for line in event["cause"].splitlines()]


def _of_failure(folder: StageDir, attempt: int, failure: Tree | None) -> list[Line]:
    if failure is None:
        return []
    file = str(folder.failure(attempt, failure["rank"]))
    return [Line(file, 0, line) for line in (*failure["lines"], *failure["message"].splitlines())]


def _files(run: RunDir, folder: StageDir, attempt: int, first: int | None) -> Iterator[Path]:
    """Logs, the most telling first: of the rank that failed first, of the launchers, of Slurm, of the other ranks."""
    ranks = folder.ranks_with_logs(attempt)
    ranks = [*([first] if first in ranks else []), *(rank for rank in ranks if rank != first)]
    logs = [folder.log(attempt, rank) for rank in ranks[:RANKS_READ]]
    around = [*folder.logs(attempt).glob("launcher*.log"), *folder.job_logs(), run.driver_log]
    for file in (*logs[:1], *sorted(around), *logs[1:]):
        if file.is_file():
            yield file


def _tail(file: Path) -> list[Line]:
    try:
        closing.check(file)
    except Damaged as error:
        return [Line(str(file), 0, problem.what) for problem in error.problems]
    with open(file, "rb") as handle:
        size = handle.seek(0, 2)
        handle.seek(max(0, size - TAIL_BYTES))
        text = handle.read().decode("utf-8", "replace")
    whole = size <= TAIL_BYTES
    return [
        Line(str(file), number if whole else 0, printable(line.rstrip("\r").rsplit("\r", 1)[-1]))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
