"""What a person, or a new profile, should know of a cluster. Asks Slurm, starts no job, prints no secret's value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemotron_recipes.executors.remote import there, transport
from nemotron_recipes.executors.slurm import control, limits
from nemotron_recipes.executors.slurm.profile import SlurmProfile
from nemotron_recipes.executors.slurm.site import Partition, Site, Unreadable, read_site
from nemotron_recipes.spec import Examination, Finding, Tree

OLDEST = (20, 11)  # the parsers know what Slurm prints from here on
CREDENTIALS = ("HF_TOKEN", "WANDB_API_KEY", "NGC_API_KEY")
_FILES = {
    "Hugging Face login": "~/.cache/huggingface/token",
    "netrc (W&B login)": "~/.netrc",
    "enroot credentials": "~/.config/enroot/.credentials",
}


def examine(profile: SlurmProfile) -> Examination:
    """All findings, and a profile that would fit this user here."""
    try:
        site = read_site()
        policy = limits.read_policy(site)
    except control.Unreachable as error:
        fix = "run this where Slurm's commands work (a login node)"
        return Examination((Finding("Slurm", "problem", f"it can't be asked: {error}; {fix}"), *_credentials()))
    except Unreadable as error:
        said = f"it prints what is not known here: {error}"
        return Examination((Finding("Slurm", "problem", said), *_credentials()))
    has_pyxis = "--container-image" in control.ask("srun", "--help")
    findings = [
        *_of_slurm(site),
        *(_of_partition(site, partition) for partition in site.partitions),
        *_of_accounts(site),
        *_of_limits(site, policy),
        _of_containers(profile, has_pyxis),
        _of_mpi(site),
        *_credentials(),
    ]
    return Examination(tuple(findings), _suggested(site, has_pyxis))


def _of_slurm(site: Site) -> list[Finding]:
    known = tuple(int(part) for part in site.version.split(".")[:2]) >= OLDEST
    findings = [Finding("Slurm", "ok" if known else "warning", f"{site.version}, cluster {site.cluster}")]
    works = _accounting()
    said = f"it enforces {', '.join(sorted(site.enforced - {'none'})) or 'nothing'}"
    without = "sacct does not work: Slurm forgets how a job ended after MinJobAge; look at runs before that"
    findings.append(Finding("accounting", "ok" if works else "warning", said if works else without))
    return findings


def _accounting() -> bool:
    """Whether sacct answers, and be it with nothing."""
    try:
        control.answer("sacct", "--noheader", "-X", "--starttime=now", "--format=JobID")
    except control.Unreachable:
        return False
    return True


def _of_partition(site: Site, partition: Partition) -> Finding:
    kinds = site.nodes_of(partition.name)
    down = sum(kind.count for kind in kinds if kind.down)
    hardware = sorted({f"{k.cpus} CPUs, {k.memory // 1024} GiB, {k.gpus} GPU(s) {k.gpu_type}".rstrip() for k in kinds})
    said = [
        f"{partition.nodes} node(s) of {' or '.join(hardware) or 'no known kind'}",
        f"at most {partition.max_time}" if partition.max_seconds is not None else "no time limit",
    ]
    if partition.max_nodes is not None:
        said.append(f"at most {partition.max_nodes} node(s) a job")
    if partition.accounts is not None:
        said.append(f"accounts {', '.join(sorted(partition.accounts))} only")
    if partition.qos is not None:
        said.append(f"QOS {', '.join(sorted(partition.qos))} only")
    if down:
        said.append(f"{down} down or drained")
    state = "ok" if partition.state == "UP" and down < partition.nodes else "warning"
    name = f"partition {partition.name}{' (default)' if partition.default else ''}"
    return Finding(name, state, f"{partition.state}, {'; '.join(said)}")


def _of_accounts(site: Site) -> list[Finding]:
    if site.associations is None:
        state = "warning" if site.enforces_accounts else "ok"
        return [Finding("accounts", state, "sacctmgr names none for this user, or can't be asked")]
    found: dict[str, set[str]] = {}
    for association in site.associations:
        found.setdefault(association.account, set()).update(association.qos)
    return [Finding(f"account {name}", "ok", f"QOS {', '.join(sorted(qos)) or 'none'}") for name, qos in found.items()]


def _of_limits(site: Site, policy: limits.Policy | None) -> list[Finding]:
    """Of each account and QOS of this user's what limits it, if anything does."""
    if policy is None:
        return [Finding("limits", "ok", "sacctmgr tells none")]
    names = {name for member in policy.mine for name in member.qos} | {p.own_qos for p in site.partitions}
    accounts = {member.account for member in policy.mine}
    holders = [member.holder for member in policy.mine]
    holders += [member.holder for name, member in policy.accounts.items() if name in accounts]
    holders += [policy.qos[name].holder for name in sorted(names) if name in policy.qos]
    not_held = "" if limits.enforced(site) else "; not enforced (AccountingStorageEnforce)"
    found = [Finding(f"limits of {h.name}", "ok", f"{h}{not_held}") for h in holders if h.limits]
    return found or [Finding("limits", "ok", f"none of account or QOS{not_held}")]


def _of_containers(profile: SlurmProfile, has_pyxis: bool) -> Finding:
    if has_pyxis:
        return Finding("Pyxis", "ok", "srun takes --container-image")
    state = "problem" if profile.image else "ok"
    return Finding("Pyxis", state, "srun has no --container-image: leave container_image unset, or container = false")


def _of_mpi(site: Site) -> Finding:
    said = control.ask("srun", "--mpi=list", errors=True)  # older ones print it where errors go
    types = [line.removeprefix("srun:").strip() for line in said.splitlines()]
    names = [line for line in types if line and " " not in line]
    return Finding("MPI types", "ok", f"{', '.join(names) or 'not told'}; default {site.mpi_default or 'none'}")


def _credentials() -> list[Finding]:
    """Names and whether they are there."""
    findings = [Finding(name, "ok", "set" if os.environ.get(name) else "not set") for name in CREDENTIALS]
    for name, path in _FILES.items():
        found = transport.call(there.is_file, path)
        findings.append(Finding(name, "ok", f"{path} {'is there' if found else 'is not there'}"))
    return findings


def _suggested(site: Site, has_pyxis: bool) -> Tree:
    """A profile for the partition with the most GPUs that is up; the default one where there are none."""
    up = [p for p in site.partitions if p.state == "UP"]
    if not up:
        return {}

    def gpus(partition: Partition) -> int:
        return sum(kind.gpus * kind.count for kind in site.nodes_of(partition.name) if not kind.down)

    best = max(up, key=lambda p: (gpus(p), p.default))
    most = max((kind.gpus for kind in site.nodes_of(best.name) if not kind.down), default=0)
    profile: dict[str, Any] = {"executor": "slurm"}
    mine = [a.account for a in site.associations or () if best.accounts is None or a.account in best.accounts]
    if mine:
        profile["account"] = min(mine, key=lambda name: name == "root")  # Slurm's own account is nobody's to charge
    profile |= {"partition": best.name, "nodes": 1, "ntasks_per_node": most or 1}
    if most:
        profile["gpus_per_node"] = most
    four_hours = best.max_seconds is None or best.max_seconds >= 4 * 3600
    profile |= {"time": "04:00:00" if four_hours else best.max_time, "max_requeues": 20}
    if has_pyxis:
        profile["mounts"] = [f"{Path.cwd()}:{Path.cwd()}"]
    return profile
