"""Code of completions: what it earns, and what it may not do to the machine."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest

from nemotron_recipes.worker.trl import sandbox_child
from nemotron_recipes.worker.trl.sandbox import run, share_passed

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


def test_a_program_that_does_not_end_is_killed_with_all_that_it_started(tmp_path):
    """A child in a session of its own holds a lock on a file: the lock is free again when the program is gone."""
    import fcntl

    held = tmp_path / "held"
    held.touch()
    code = f"""
import fcntl, os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        file = open({str(held)!r}, "r+")
        fcntl.flock(file, fcntl.LOCK_EX)
        open({str(tmp_path / "ready")!r}, "w").close()
        while True:
            time.sleep(60)
    os._exit(0)
while not os.path.exists({str(tmp_path / "ready")!r}):
    time.sleep(0.01)
{{}}
"""
    for last, seconds in (("", 120.0), ("while True: pass", 3.0)):
        (tmp_path / "ready").unlink(missing_ok=True)
        outcome = run(code.format(last), seconds, MEMORY)
        assert outcome.timed_out is bool(last), outcome
        if (tmp_path / "ready").exists():  # under load three seconds may be over before
            with held.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_secret_and_no_variable_of_ours_is_in_its_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET_TOKEN", "s3cr3t")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    outcome = run("import os; print(sorted(os.environ))", 60.0, MEMORY)
    assert outcome.finished
    assert outcome.output.strip() == "['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'TMPDIR']"


def test_where_the_kernel_allows_it_there_is_no_network():
    """The outcome says which it was, and that is how it is."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 30)", 60.0, MEMORY)
    assert outcome.finished is outcome.network


def test_a_program_in_its_own_namespace_sees_no_other_process():
    outcome = run(f"import os; os.kill({os.getpid()}, 0)", 60.0, MEMORY)
    assert outcome.finished is outcome.network


def test_its_folder_is_gone_afterwards():
    outcome = run("import os; open('left', 'w').close(); print(os.getcwd())", 60.0, MEMORY)
    assert outcome.finished and not Path(outcome.output.strip()).exists()


@pytest.mark.parametrize(
    "mischief",
    ["os.remove('printed')", "os.rename('printed', 'p'); os.mkdir('printed')", "os.chmod('.', 0)", "os.lseek(1, 9, 0)"],
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
