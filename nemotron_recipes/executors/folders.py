"""What a folder that runs write to can do: room, quota, rights, locks, and whether its server's clock is ours."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import time
import uuid
from contextlib import suppress
from pathlib import Path

from nemotron_recipes.spec import Finding

LITTLE = 1e9  # bytes; a run's own files take some MB, a checkpoint of any model more than this
QUOTA_SECONDS = 20.0  # an NFS server that is gone does not answer quota
SKEW_SECONDS = 2.0  # a later deadline or a record's time would lie by more than a step

# Of these /proc/self/mounts knows that they lie on other machines.
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "pvfs2", "cifs", "smb3", "fuse.glusterfs")


def nearest_existing(folder: Path) -> Path:
    """The folder, or the first above it that is seen to be there: where it would be made."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def look_at(name: str, folder: Path) -> list[Finding]:
    """The findings about one folder. Makes and removes one small file."""
    place = nearest_existing(folder)
    usage = shutil.disk_usage(place)
    room = "problem" if usage.free == 0 else "warning" if usage.free < LITTLE else "ok"
    said = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free below {place}"
    findings = [Finding(f"{name} room", room, said), quota(name, place)]
    probe = place / f".doctor-{uuid.uuid4().hex}"
    try:
        with open(probe, "xb") as handle:
            handle.write(b"x")
            handle.flush()
            os.fsync(handle.fileno())
            skew = probe.stat().st_mtime - time.time()
            findings.append(Finding(f"{name} writable", "ok", str(place)))
            findings.append(_locks(name, handle.fileno()))
            state = "ok" if abs(skew) <= SKEW_SECONDS else "warning"
            said = f"its files are stamped {skew:+.1f} s from this machine's time"
            findings.append(Finding(f"{name} clock", state, said))
    except OSError as error:
        findings.append(Finding(f"{name} writable", "problem", f"{place}: {error.strerror}"))
    finally:
        with suppress(OSError):
            probe.unlink()
    return findings


def ahead(folder: Path) -> float:
    """By how many seconds, at least, the folder's server is ahead of this machine; below 0: behind. OSError."""
    probe = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        before = time.time()
        with open(probe, "xb") as handle:
            handle.write(b"x")
            handle.flush()
            os.fsync(handle.fileno())
            after, stamp = time.time(), os.fstat(handle.fileno()).st_mtime
    finally:
        with suppress(OSError):
            probe.unlink()
    return stamp - min(max(stamp, before), after)  # a disk that is slow to write is no clock that is wrong


def quota(name: str, place: Path) -> Finding:
    """This user's quota there, as `lfs quota` (Lustre) or `quota` tells it; that it is not known where neither can."""
    me = str(os.getuid())
    lustre = _file_system(str(place)) == "lustre"
    argv = ["lfs", "quota", "-q", "-u", me, str(place)] if lustre else ["quota", "-w", "-p", "-f", str(place)]
    topic = f"{name} quota"
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=QUOTA_SECONDS, check=False
        )
    except FileNotFoundError:
        return Finding(topic, "ok", f"not known: there is no command {argv[0]} here")
    except OSError as error:
        return Finding(topic, "ok", f"not known: {argv[0]} can't be run: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Finding(topic, "ok", f"not known: {argv[0]} did not answer within {QUOTA_SECONDS:.0f} s")
    try:
        return _of_quota(topic, parse_quota(done.stdout))  # quota ends with 1 where one is exceeded, too
    except ValueError as error:
        words = (done.stderr.strip() or str(error)).splitlines()[0]
        return Finding(topic, "ok" if done.returncode else "warning", f"not known: {argv[0]} says {words}")


def parse_quota(text: str) -> tuple[int, ...] | None:
    """(bytes, soft, hard, files, soft, hard) of `quota -w -p` or `lfs quota -q`; 0: no limit. None: no quota.

    ValueError: it is something else. Both print nine columns, sizes in KiB: file system, size, soft, hard, grace,
    files, soft, hard, grace. An asterisk marks what is exceeded, brackets (lfs) what is not exact.
    """
    if re.search(r"^Disk quotas for user .*: none\s*$", text, re.MULTILINE):
        return None
    words = re.sub(r"^(Disk quotas for user .*|\s*Filesystem\s.*)$", "", text, flags=re.MULTILINE).split()
    numbers = [word.strip("[]*") for word in (*words[1:4], *words[5:8])]
    if len(words) != 9 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{text.strip()[:200]!r}")
    size, soft, hard, *files = (int(number) for number in numbers)
    return (size * 1024, soft * 1024, hard * 1024, *files)


def _of_quota(topic: str, told: tuple[int, ...] | None) -> Finding:
    if told is None:
        return Finding(topic, "ok", "none is set")
    size, soft, hard, files, soft_files, hard_files = told
    most, most_files = hard or soft, hard_files or soft_files
    said = f"{size / 1e9:.1f} GB of {f'{most / 1e9:.1f} GB' if most else 'no limit'}"
    said += f", {files} files of {most_files or 'no limit'}"
    if (hard and size >= hard) or (hard_files and files >= hard_files):
        return Finding(topic, "problem", f"{said}: it is used up")
    near = (most and most - size < LITTLE) or (soft and size > soft) or (soft_files and files > soft_files)
    return Finding(topic, "warning" if near else "ok", said)


def refusal(folder: Path) -> str:
    """Why nothing can be written there; "" when something can."""
    place = nearest_existing(folder)
    wrong = errno.ENOTDIR if not place.is_dir() else errno.EACCES if not os.access(place, os.W_OK | os.X_OK) else 0
    if wrong:
        return f"{folder} can't be written: {place}: {os.strerror(wrong)}"
    free = shutil.disk_usage(place).free
    return "" if free else f"{folder} can't be written: no room is left below {place}"


def _locks(name: str, descriptor: int) -> Finding:
    for how, lock in (("flock", fcntl.flock), ("fcntl", fcntl.lockf)):
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding(f"{name} locks", "warning", f"{how} does not work there: {error.strerror}")
    return Finding(f"{name} locks", "ok", "flock and fcntl work")


def shared(path: str, run_dir: str) -> bool:
    """Whether all nodes see the folder that would hold `path`."""
    folder, run = nearest_existing(Path(path)), nearest_existing(Path(run_dir))
    return os.stat(folder).st_dev == os.stat(run).st_dev or _file_system(str(folder)).startswith(_NETWORK)


def may_fall_silent(folder: Path) -> bool:
    """Whether it is on another machine, or behind a program (sshfs), as far as the kernel says."""
    return _file_system(str(folder)).startswith((*_NETWORK, "fuse"))


def _file_system(folder: str) -> str:
    """The type of the one that holds `folder`; "" where the kernel doesn't say."""
    real, best = os.path.realpath(folder), ("", "")
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as table:
            for line in table:
                _, point, kind, *_ = line.split(" ")
                point = point.replace("\\040", " ")
                if Path(real).is_relative_to(point) and len(point) >= len(best[0]):
                    best = (point, kind)
    except OSError:  # not Linux
        return ""
    return best[1]
