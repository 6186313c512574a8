"""The Slurm tests, and the recordings that unit tests read, with other Slurms than the one that is installed.

    python tools/slurm_versions.py test bullseye trixie sid [-- PYTEST-ARGUMENTS]
    python tools/slurm_versions.py record here bullseye trixie sid

Each name is a Debian suite, whose Slurm is fetched into .slurm/ and kept there, or a folder that `slurm/testcluster
fetch` has made; `here` is the one on the PATH. `record` replaces tests/recorded/slurm-VERSION/answers.json: read the
diff.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".slurm"
sys.path.insert(0, str(ROOT))

from nemotron_recipes.errors import NemotronError  # noqa: E402
from slurm import releases  # noqa: E402

# Real jobs, their following, states, ends and requeues; not what is this machine's alone (containers, SSH, users).
TESTS = (
    *("test_slurm_executor", "test_following", "test_requeue", "test_watchdog", "test_sweeps", "test_many_runs"),
    *("test_array", "test_doctor", "test_slurm_answers"),
)


def main(argv: list[str]) -> int:
    """One Slurm after the other; the exit code: 0 where all went well."""
    words, _, extra = _split(argv, "--")
    if len(words) < 2 or words[0] not in ("test", "record"):
        sys.exit(__doc__)
    codes = []
    for name in words[1:]:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            if name != "here":
                environ["PATH"] = f"{_fetched(name) / 'bin'}{os.pathsep}{os.environ['PATH']}"
        except NemotronError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            codes.append(error.exit_code)
            continue
        command = [sys.executable, "-m", "tests.helpers.slurm_scenes"]
        if words[0] == "test":
            files = [f"tests/slurm/{each}.py" for each in TESTS]
            files.append("tests/contract/test_executor_contract.py")
            command = [sys.executable, "-m", "pytest", *files, "-k", "not docker and not local", *extra]
        codes.append(subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode)
        print(f"{name}: {'ended with ' + str(codes[-1]) if codes[-1] else 'ok'}", flush=True)
    return max(codes)


def _split(argv: list[str], mark: str) -> tuple[list[str], str, list[str]]:
    place = argv.index(mark) if mark in argv else len(argv)
    return argv[:place], mark, argv[place + 1 :]


def _fetched(suite: str) -> Path:
    folder = Path(suite).resolve() if (Path(suite) / releases.NOTE).exists() else KEPT / suite
    if not (folder / releases.NOTE).exists():
        print(f"Slurm of {suite}: fetched into {folder}", flush=True)
        releases.fetch(suite, folder)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
