"""What a short job finds on the nodes themselves: `nemotron doctor PROFILE --deep`. Who stops asking takes it back."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import nemotron_recipes
from nemotron_recipes.errors import NemotronError
from nemotron_recipes.executors.folders import SKEW_SECONDS
from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.slurm import control, reasons, submission
from nemotron_recipes.executors.slurm.profile import SlurmProfile
from nemotron_recipes.spec import Examination, Finding, Tree

JOB_MINUTES = 10  # the time limit of the job; the probe's own waits end before
POLL_SECONDS = 0.5
CACHED_SECONDS = 60.0  # for so long a network file system may show the login node an old list of files
HOSTS, OUT = "hosts", "out.txt"
_FIELDS = (
    *("account", "qos", "gpus_per_node", "gpus_per_task", "gres", "cpus_per_task", "cpus_per_gpu", "mem"),
    *("mem_per_cpu", "mem_per_gpu", "exclusive", "constraint", "exclude", "segment", "network"),
)


def look_into_nodes(profile: SlurmProfile, place: str, patience: float) -> Examination:
    """A finding per node, one for all together; the suggestion leaves out (`exclude`) those that would not do.

    place      a folder that all nodes see; what is put there is removed again
    patience   seconds for the job to start; then, as on Ctrl-C, it is withdrawn
    """
    name = f"nemotron-doctor-{secrets.token_hex(4)}"
    folder = f"{place.rstrip('/')}/.{name}"
    try:
        return _looked(profile, name, folder, patience)
    except (control.Unreachable, control.Refused, OSError) as error:
        return Examination((Finding("nodes", "problem", f"the job that looks at them can't be run: {error}"),))
    finally:
        with suppress(control.Unreachable, OSError):
            transport.call(there.remove_folder, folder)


def _looked(profile: SlurmProfile, name: str, folder: str, patience: float) -> Examination:
    probe = Path(nemotron_recipes.__file__).parent / "worker" / "node_probe.py"
    transport.call(there.make_folder, f"{folder}/code")
    transport.call(there.write, f"{folder}/node_probe.py", probe.read_text(encoding="utf-8"))
    transport.call(there.write, f"{folder}/job.sh", script(profile, name, folder))
    ahead = transport.call(there.clock, folder)
    state, waited = _job(profile, name, folder, patience)
    if waited:
        words = reasons.words_of(state.reason or "None") if state else "Slurm knows no such job"
        said = f"the queue did not start the job that looks at them within {patience:.0f} s ({words}); it is withdrawn"
        return Examination((Finding("nodes", "problem", f"{said}. Wait longer: --deep-timeout SECONDS"),))
    texts = transport.call(there.texts, folder)
    deadline = time.monotonic() + CACHED_SECONDS
    while state and state.state == "COMPLETED" and len(_files(texts, "reduce")) < _processes(profile):
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
        texts = transport.call(there.texts, folder)
    return judged(texts, state.state if state else "gone", ahead, profile)


def script(profile: SlurmProfile, name: str, folder: str) -> str:
    """The job: as a run's, on bare metal, a process for each GPU of a node or one."""
    from nemotron_recipes.executors.slurm.nemo_run import BatchJob, batch_script

    fields = {key: getattr(profile, key) for key in _FIELDS}
    fields |= {"nodes": profile.nodes, "time": str(JOB_MINUTES), "partition": profile.partition_for("batch")}
    each = asked_gpus(profile) or 1
    setup = ("set +vx", *(("set -e", *profile.setup, "set +e") if profile.setup else ()))
    setup = (*setup, 'export NEMOTRON_PROBE_HOST="${nodes[0]}"')
    setup = (*setup, f"printf '%s\\n' \"${{nodes[@]}}\" > {shlex.quote(f'{folder}/{HOSTS}')}")
    job = BatchJob(
        name=name,
        folder=folder,
        output=f"{folder}/{OUT}",
        srun_output=f"{folder}/{OUT}",
        fields={key: value for key, value in fields.items() if value is not None and value is not False},
        parameters={key: value for key, value in profile.additional_parameters.items() if value is not False},
        setup=setup,
        # A process that fails is found by its missing file; the others must still write theirs.
        srun_args=("--kill-on-bad-exit=0", *_spread(profile.nodes, each), "--open-mode=append", *profile.srun_args),
        command=(profile.interpreter, f"{folder}/node_probe.py", folder),
        remove=tuple(profile.remove),
    )
    return batch_script(job)


def asked_gpus(profile: SlurmProfile) -> int:
    """GPUs that a node should have."""
    return profile.gpus_per_node or profile.gpus_per_task or 0


def _processes(profile: SlurmProfile) -> int:
    return profile.nodes * (asked_gpus(profile) or 1)


def _spread(nodes: int, each: int) -> tuple[str, ...]:
    """Of a job that has one task per node, so many: the CPUs of that one are shared by all."""
    if each == 1:
        return ()
    return (f"--ntasks={nodes * each}", f"--ntasks-per-node={each}", "--overcommit")


def _job(profile: SlurmProfile, name: str, folder: str, patience: float) -> tuple[control.JobState | None, bool]:
    """(how the job ended, whether it never began). Whatever ends this, no job is left."""
    token = submission.new_token(name)
    argv = ["sbatch", "--parsable", "--no-requeue", f"--comment={token}", f"{folder}/job.sh"]
    answer, job, over = Path(folder, "answer"), None, False
    try:
        job = submission.submit(argv, folder, profile.secrets, answer, token, name, ())
        deadline = time.monotonic() + patience
        while True:
            try:
                state = control.job_state(job)
            except control.Unreachable:  # the job goes on meanwhile; it ends by itself
                if time.monotonic() > deadline + JOB_MINUTES * 60:
                    raise
                time.sleep(POLL_SECONDS)
                continue
            if state is None or not state.active:
                over = True
                return state, False
            if state.waiting and time.monotonic() > deadline:
                return state, True
            time.sleep(POLL_SECONDS)
    finally:
        if not over:
            with suppress(NemotronError):
                job = job or submission.found(answer, token, name, (), submission.PATIENCE)
                control.scancel([job] if job else [])


def judged(texts: Mapping[str, str], ended: str, ahead: float, profile: SlurmProfile) -> Examination:
    """What the files of the job say. Pure.

    texts   name -> content: the probe's files, HOSTS and OUT
    ended   the job's state
    ahead   by how many seconds the folder's server is ahead of the login node
    """
    hosts, facts = texts.get(HOSTS, "").split(), _files(texts, "facts")
    if not hosts or not facts:  # no node's fault
        last = " / ".join(texts.get(OUT, "").strip().splitlines()[-3:]) or "it printed nothing"
        said = f"the job that looks at them ended as {ended} and says nothing of any: {last}"
        return Examination((Finding("nodes", "problem", said),))
    findings, bad = [], []
    for host in hosts:
        mine = [each for each in facts if each["node"] == host]
        finding = _of_node(host, mine, ahead, asked_gpus(profile))
        findings.append(finding)
        bad += [host] if finding.state == "problem" else []
    findings.append(_of_reduce(_files(texts, "reduce"), _processes(profile)))
    left_out = [*filter(None, (profile.exclude or "").split(",")), *bad]
    return Examination(tuple(findings), {"exclude": ",".join(left_out)} if bad else {})


def _files(texts: Mapping[str, str], kind: str) -> list[Tree]:
    return [json.loads(text) for name, text in sorted(texts.items()) if re.fullmatch(rf"{kind}-\d+\.json", name)]


def _of_node(host: str, ranks: list[Tree], ahead: float, gpus: int) -> Finding:
    """One row: its GPUs, software, folder and clock, as the first process there has seen them."""
    topic = f"node {host}"
    told: dict[str, Any] | None = next((each for each in ranks if "gpus" in each), None)
    if told is None:
        return Finding(topic, "problem", "no word from it: the job's process there did not come to its end")
    wrong = []
    if told["gpus"] < gpus:
        why = f": {told['gpu_error']}" if told["gpu_error"] else ""
        wrong.append(f"of {gpus} GPU(s) that it should have nvidia-smi sees {told['gpus']}{why}")
    if len(ranks) < (gpus or 1):
        wrong.append(f"{len(ranks)} of {gpus} processes came up")
    torch = f"torch {told['torch']}" if told["torch"] else f"no torch ({told['torch_error']})"
    said = [f"{told['gpus']} GPU(s)", f"Python {told['python']}", torch]
    if told["folder_error"]:
        wrong.append(f"it can't use the shared folder: {told['folder_error']}")
    else:
        skew = ahead - told["ahead"]
        said.append(f"writes {told['write'] / 1e6:.0f} MB/s, reads {told['read'] / 1e6:.0f} MB/s")
        said.append(f"clock {skew:+.1f} s from the login node's")
        if abs(skew) > SKEW_SECONDS:
            wrong.append(f"its clock differs by more than {SKEW_SECONDS:g} s")
    return Finding(topic, "problem" if wrong else "ok", "; ".join([*wrong, ", ".join(said)]))


def _of_reduce(ranks: list[Tree], wanted: int) -> Finding:
    """All of them together."""
    errors = {f"{each['node']}: {each['error']}" for each in ranks if "error" in each}
    if errors or len(ranks) < wanted:
        said = f"{len(ranks)} of {wanted} processes came to the end of it"
        return Finding("all-reduce", "problem", "; ".join([said, *sorted(errors)]))
    skipped = [each["skipped"] for each in ranks if "skipped" in each]
    if skipped:
        return Finding("all-reduce", "warning", f"not tried: {skipped[0]}")
    slowest, backend = max(each["seconds"] for each in ranks), ranks[0]["backend"]
    said = f"{wanted} process(es), {backend}: 16 MiB in {slowest * 1e3:.1f} ms"
    return Finding("all-reduce", "ok", said)
