"""The text of Slurm's configuration files for a test cluster. Pure."""

from __future__ import annotations

from slurm.spec import Spec

CGROUPS_DISABLED = (23, 11)  # from here on slurmd wants a cgroup plugin, or to be told that there is none
STORE_FLAGS = (21, 8)  # from here on the accounting can keep scripts and environments
SLURMDBD_PORT, SLURMCTLD_PORT, FIRST_NODE_PORT = 1, 0, 2  # places in Spec.ports


def slurm_conf(spec: Spec) -> str:
    """slurm.conf. Parameters in `spec.settings` replace ours, whatever their case."""
    parameters = _parameters(spec)
    ours = {key.lower(): key for key in parameters}
    for key, value in spec.settings.items():
        parameters.pop(ours.get(key.lower(), ""), None)
        parameters[key] = value
    lines = [f"{key}={value}" for key, value in parameters.items()]
    gres = f" Gres=gpu:{spec.gpus}" if spec.gpus else ""
    for number, name in enumerate(spec.node_names, 1):
        host = name if spec.isolated else spec.host
        lines.append(
            f"NodeName={name} NodeHostname={host} NodeAddr={spec.node_address(number)} "
            f"Port={spec.ports[FIRST_NODE_PORT + number - 1]} CPUs={spec.cpus} Sockets=1 CoresPerSocket={spec.cpus} "
            f"ThreadsPerCore=1 RealMemory={spec.memory_mb}{gres} State=UNKNOWN"
        )
    lines += [
        "PartitionName=batch Nodes=ALL Default=YES MaxTime=1-00:00:00 State=UP",
        "PartitionName=interactive Nodes=ALL MaxTime=01:00:00 State=UP",
    ]
    return "\n".join(lines) + "\n"


def gres_conf(spec: Spec) -> str:
    """gres.conf: GPUs that are symbolic links to /dev/null. Count= without File= would be reported as 0 GPUs."""
    if not spec.gpus:
        return ""
    numbers = "0" if spec.gpus == 1 else f"[0-{spec.gpus - 1}]"
    return f"AutoDetect=off\nNodeName={','.join(spec.node_names)} Name=gpu File={spec.files.devices}/gpu{numbers}\n"


def cgroup_conf(spec: Spec) -> str:
    """cgroup.conf: Slurm that could be told so makes no cgroups at all."""
    return "CgroupPlugin=disabled\n" if spec.release.number >= CGROUPS_DISABLED else ""


def plugstack_conf(spec: Spec) -> str:
    """plugstack.conf. Required: a job whose container can't be made fails, as with Pyxis."""
    files = spec.files
    if not spec.standin:
        return ""
    return f"required {files.standin} data={files.containers} registry={files.registry}\n"


def slurmdbd_conf(spec: Spec) -> str:
    """slurmdbd.conf. The database knows the user by its socket's peer, so there is no password."""
    files = spec.files
    return "\n".join(
        [
            "AuthType=auth/munge",
            f"AuthInfo=socket={files.munge_socket}",
            f"DbdHost={spec.host}",
            "DbdAddr=127.0.0.1",
            f"DbdPort={spec.ports[SLURMDBD_PORT]}",
            f"SlurmUser={spec.user}",
            f"PidFile={files.run}/slurmdbd.pid",
            f"LogFile={files.log}/slurmdbd.log",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            f"StorageUser={spec.user}",
            "StorageLoc=slurm_acct_db",
            "CommitDelay=0",
            *([f"PluginDir={spec.release.plugins}"] if spec.release.plugins else []),
            "",
        ]
    )


def hosts(spec: Spec) -> str:
    """/etc/hosts as every node of its own host name sees it."""
    lines = ["127.0.0.1 localhost", "::1 localhost", f"127.0.0.1 {spec.host}"]
    lines += [f"{spec.node_address(number)} {name}" for number, name in enumerate(spec.node_names, 1)]
    return "\n".join(lines) + "\n"


def _parameters(spec: Spec) -> dict[str, str]:
    files = spec.files
    parameters = {
        "ClusterName": spec.name,
        "SlurmctldHost": f"{spec.host}(127.0.0.1)",
        "SlurmctldPort": str(spec.ports[SLURMCTLD_PORT]),
        # Clusters of one machine share its loopback: jobs of different numbers don't ask for the same port.
        "FirstJobId": str(spec.ports[SLURMCTLD_PORT] % 4000 + 1),
        "SlurmUser": spec.user,
        "SlurmdUser": spec.user,
        "AuthType": "auth/munge",
        # A requeued job waits for cred_expire seconds before it may start again (120 unless told).
        "AuthInfo": f"socket={files.munge_socket},cred_expire=5",
        "CredType": "cred/munge",
        "StateSaveLocation": str(files.state),
        "SlurmdSpoolDir": f"{files.spool}/%n",
        "SlurmctldPidFile": f"{files.run}/slurmctld.pid",
        "SlurmdPidFile": f"{files.run}/slurmd.%n.pid",
        "SlurmctldLogFile": f"{files.log}/slurmctld.log",
        "SlurmdLogFile": f"{files.log}/%n.log",
        "MailProg": "/bin/true",
        # No cgroups: they need a delegated hierarchy, which neither a container nor a normal user has.
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/linux",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SlurmdParameters": "config_overrides",  # nodes have the CPUs that are configured, not the machine's
        "ReturnToService": "2",
        "SlurmctldTimeout": "10",
        # How soon a dead node is noticed depends on both: see docs/testcluster.md. Lower ones fail on a busy machine.
        "SlurmdTimeout": "10",
        "MessageTimeout": "5",
        "TreeWidth": "65533",  # slurmctld speaks to every node itself: a dead one delays no other's answer
        "KillWait": "3",
        "InactiveLimit": "0",
        "MinJobAge": "300",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=2",
    }
    if spec.gpus:
        parameters["GresTypes"] = "gpu"
    if spec.accounting:
        parameters |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": str(spec.ports[SLURMDBD_PORT]),
            "AccountingStoragePass": str(files.munge_socket),
        }
        if spec.release.number >= STORE_FLAGS:
            parameters["AccountingStoreFlags"] = "job_comment,job_env,job_script"
        if spec.gpus:
            parameters["AccountingStorageTRES"] = "gres/gpu"
        if spec.accounts:
            parameters["AccountingStorageEnforce"] = "associations"
    if spec.release.plugins:
        parameters["PluginDir"] = spec.release.plugins
    return parameters
