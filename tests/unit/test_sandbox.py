"""Code of completions: what it earns, and what it may not do to the machine."""

from __future__ import annotations

import os
import platform
import resource
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from nemotron_recipes.worker.trl import sandbox, sandbox_child, sandbox_walls
from nemotron_recipes.worker.trl.sandbox import Outcome, run, share_passed, walls

MEMORY = 512 << 20
ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("code", "tests", "share"),
    [
        (ADD, "assert add(1, 2) == 3", 1.0),
        (ADD, "assert add(1, 2) == 4", 0.0),
        ("def add(a, b:", "assert True", 0.0),
        ("raise SystemExit(0)", "assert False", 0.0),
        ("import os; os._exit(0)", "assert False", 0.0),
        ("import sys; sys.exit = None", "assert 1 + 1 == 2", 1.0),
        ("print(int(input()) * 2)", [{"input": "4\n", "output": "8"}, {"input": "5", "output": " 10 \n"}], 1.0),
        ("print(8)", [{"input": "4\n", "output": "8"}, {"input": "5\n", "output": "10"}], 0.5),
        ("print('größe'); exit()", [{"input": "", "output": "größe"}], 1.0),
        ("x = 'a' * (1 << 30)", "assert True", 0.0),  # more memory than it may have
        ("open('f', 'wb').write(b'a' * (32 << 20))", "assert True", 0.0),  # a larger file than it may write
    ],
)
def test_what_it_earns(code, tests, share):
    assert share_passed(code, tests, 60.0, MEMORY) == share


def test_a_program_that_does_not_end_is_killed_with_all_that_it_started():
    """A child in a session of its own, which nobody waits for, is gone with the program."""
    token = f"left-by-a-program-{os.getpid()}"
    code = f"""
import os
reader, writer = os.pipe()  # exec closes them
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/bin/sleep", [{token!r}, "600"])
    os._exit(0)
os.close(writer)
os.read(reader, 1)
print("ready", flush=True)
{{}}
"""
    for last, seconds in (("", 120.0), ("while True: pass", 3.0)):
        outcome = run(code.format(last), seconds, MEMORY)
        assert outcome.timed_out is bool(last), outcome
        assert outcome.output == "ready\n" or last  # under load three seconds may be over before
        assert not [p for p in psutil.process_iter(["cmdline"]) if token in (p.info["cmdline"] or [])]


def test_no_secret_and_no_variable_of_ours_is_in_its_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET_TOKEN", "s3cr3t")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    outcome = run("import os; print(sorted(os.environ))", 60.0, MEMORY)
    assert outcome.finished
    assert outcome.output.strip() == "['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'TMPDIR']"


def test_what_is_closed_is_closed_and_what_is_not_is_said(tmp_path):
    """Each thing is tried by the program itself; the outcome must say just what succeeded. 6.12 and newer close all."""
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        tries = {
            "files": [
                f"open({str(secret)!r}).read()",
                f"open({str(tmp_path / 'written')!r}, 'w')",
                f"os.listdir({str(tmp_path)!r})",
                f"os.unlink({str(secret)!r})",
                f"os.symlink({str(secret)!r}, 'link'); open('link').read()",
                f"open('/proc/{os.getpid()}/environ', 'rb').read(1)",
            ],
            "network": [
                f"socket.create_connection(('127.0.0.1', {port}), 30)",
                f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
                "socket.socket(socket.AF_UNIX)",
            ],
            "signals": [f"os.kill({os.getpid()}, 0)"],
        }
        code = "import os, socket\ndone = []\n"
        for name, lines in tries.items():
            for line in lines:
                code += f"try:\n    {line}\n    done.append({name!r})\nexcept OSError:\n    pass\n"
        outcome = run(f"{code}print(*sorted(set(done)))", 60.0, MEMORY)
    assert outcome.finished
    assert outcome.output.split() == list(outcome.left_open)
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 12):
        assert not outcome.left_open
        assert secret.read_text() == "s3cr3t" and not (tmp_path / "written").exists()
        assert walls() == (
            "programs of completions can't reach files beside its own and Python's, the network, other processes"
        )


def test_what_can_not_be_closed_is_said(monkeypatch):
    monkeypatch.setattr(sandbox, "run", lambda *request: Outcome(True, False, "", ["files"]))
    assert walls() == (
        "programs of completions can't reach the network, other processes; warning: they can reach files beside its "
        "own and Python's: this kernel, or the container's filter, has no way to close it"
    )


def test_what_python_needs_stays_there():
    code = """
import asyncio, concurrent.futures, decimal, hashlib, json, random, re, sqlite3, subprocess, sys, tempfile, threading
assert subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout == "42\\n"
with tempfile.TemporaryFile() as file:
    file.write(b"x" * 100)
open("mine", "w").write("x"); assert open("mine").read() == "x"
async def one(): return 1
assert asyncio.run(one()) == 1
random.SystemRandom().random()
"""
    assert share_passed(code, "import statistics; assert statistics.mean([1, 3]) == 2", 60.0, MEMORY) == 1.0


def test_system_calls_are_those_of_the_kernels_headers():
    """Of this machine's architecture, by the C library's headers."""
    names = (
        *("socket", "io_uring_setup", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
        *("add_key", "request_key", "keyctl", "bpf", "perf_event_open", "userfaultfd", "mount", "umount2"),
        *("pivot_root", "unshare", "setns", "open_by_handle_at", "shmget", "shmat", "semget", "msgget", "mq_open"),
    )
    source = "#include <asm/unistd.h>\n" + "\n".join(f"__NR_{name}" for name in names)
    told = subprocess.run(["gcc", "-E", "-P", "-"], input=source, capture_output=True, text=True, check=True).stdout
    numbers = [int(line) for line in told.split()[-len(names) :]]
    assert numbers == [*sandbox_walls.REFUSED[platform.machine()][1:]]


def test_its_folder_is_gone_afterwards():
    outcome = run("import os; open('left', 'w').close(); print(os.getcwd())", 60.0, MEMORY)
    assert outcome.finished and not Path(outcome.output.strip()).exists()


@pytest.mark.parametrize(
    "mischief",
    [
        *("os.remove('printed')", "os.rename('printed', 'p'); os.mkdir('printed')", "os.chmod('.', 0)"),
        *("os.lseek(1, 9, 0)", "[(os.mkdir('deep'), os.chdir('deep')) for _ in range(1500)]"),
    ],
)
def test_what_it_does_to_its_folder_is_no_trouble_of_ours(mischief):
    outcome = run(f"import os\nprint('seen', flush=True)\n{mischief}", 60.0, MEMORY)
    assert outcome.finished and outcome.output == "seen\n"


@pytest.mark.parametrize("processes", [True, False])
def test_processes_are_limited_only_where_a_namespace_counts_them(monkeypatch, processes):
    """Elsewhere all threads of the user count, those of training among them, and honest programs can't fork."""
    fake_kernel = {}
    monkeypatch.setattr(resource, "setrlimit", fake_kernel.__setitem__)
    sandbox_child._limit(10.0, MEMORY, processes)
    assert (resource.RLIMIT_NPROC in fake_kernel) is processes
    assert resource.RLIMIT_AS in fake_kernel


@pytest.mark.parametrize(
    ("release", "by_namespace"),
    [("5.14.0-427.el9.x86_64", True), ("6.8-rc1", True), ("5.4.0-200-generic", False), ("4.18.0", False), ("?", False)],
)
def test_which_kernels_count_processes_by_namespace(release, by_namespace):
    assert sandbox_child.counts_by_namespace(release) is by_namespace


def test_a_program_may_have_threads():
    code = "import threading\nthreads = [threading.Thread(target=int) for _ in range(4)]\n"
    assert (
        share_passed(code + "[t.start() for t in threads]\n[t.join() for t in threads]", "assert True", 60.0, MEMORY)
        == 1.0
    )
