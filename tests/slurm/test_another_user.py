"""The command line as an ordinary user of somebody else's Slurm: no administrator, no owner of the interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import slurm
from tests.helpers.plans import ROOT

pytestmark = pytest.mark.slurm

USER, COLLEAGUE = "nobody", "daemon"
PROFILE = """
[lab]
executor = "slurm"
time = "5"
max_requeues = 1
secrets = ["MY_LICENCE"]
"""


def test_a_run_of_somebody_who_is_no_administrator() -> None:
    """A run from start to end; its secrets file is theirs alone; a waiting run is cancelled, no other job.

    And a colleague in the same output folder: sees it all, stops nothing of theirs, submits beside it.
    """
    slurm.require()
    if os.geteuid():
        pytest.skip("this is an ordinary user already: every other test of Slurm has shown the same")
    user, colleague = pwd.getpwnam(USER), pwd.getpwnam(COLLEAGUE)
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(home_open_to_all())
        python, surroundings = visible_python(home)
        own = home / "own"
        own.mkdir()
        os.chown(own, user.pw_uid, user.pw_gid)
        (own / "env.toml").write_text(PROFILE)
        cluster = stack.enter_context(slurm.cluster("--nodes=2", "--no-accounting", below=home))  # sees what is mounted
        os.chmod(cluster.folder, 0o755)
        env = {**cluster.env, **surroundings, "HOME": str(own), "MY_LICENCE": "s3cr3t-of-theirs"}

        def as_user(*words: str, code: int = 0, user: pwd.struct_passwd = user) -> str:
            command = [python, "-m", "nemotron_recipes", *words]
            change = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            done = cluster.run(*command, code=None, cwd=own, env=env, timeout=180, **change)
            assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr
            return done.stdout + done.stderr * bool(code)

        prep = ("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "40")
        assert "succeeded" in as_user(*prep, "--run", "lab")
        held = "run.additional_parameters={hold: true}"
        told = json.loads(as_user(*prep, "--force", "--batch", "lab", held, "--json"))
        secrets = Path(told["run_dir"], "secrets.json")
        assert (secrets.stat().st_uid, secrets.stat().st_mode & 0o777) == (user.pw_uid, 0o600)
        assert cluster.job(told["native"]["jobs"]["data-prep-sft"])["UserId"] == f"{USER}({user.pw_uid})"

        for folder in ("runs", "store"):  # as a site makes folders that a group shares
            (own / "nemotron-output" / folder).chmod(0o777)
        listed = json.loads(as_user("runs", "list", "--json", user=colleague))
        assert sorted(view["state"] for view in listed) == ["pending", "succeeded"]
        refused = as_user("runs", "cancel", told["run"], user=colleague, code=2)
        assert "can't be stopped" in refused
        assert "Access/permission denied" in refused
        beside = json.loads(as_user(*prep, "--force", "--batch", "lab", held, "--json", user=colleague))
        assert Path(beside["run_dir"]).stat().st_uid == colleague.pw_uid
        assert as_user("runs", "list").count("pending ") >= 2
        assert "cancelled" in as_user("runs", "cancel", beside["run"], user=colleague)
        assert cluster.job(told["native"]["jobs"]["data-prep-sft"])["JobState"] == "PENDING", "it is as it was"

        roots = cluster.sbatch("true", "--hold", cwd=own)
        assert "cancelled" in as_user("runs", "cancel", told["run"])
        assert not secrets.exists()
        assert cluster.job(roots)["JobState"] == "PENDING"


@contextlib.contextmanager
def home_open_to_all() -> Iterator[Path]:
    """A temporary folder that other users may enter; what is mounted below it goes with it."""
    with tempfile.TemporaryDirectory(prefix="nr-", dir="/var/tmp") as name:
        home = Path(name)
        home.chmod(0o755)
        try:
            yield home
        finally:
            for line in Path("/proc/mounts").read_text().splitlines():
                if line.split()[1].startswith(f"{home}/"):
                    subprocess.run(["umount", "--lazy", line.split()[1]], check=True)


def visible_python(home: Path) -> tuple[str, dict[str, str]]:
    """This interpreter, and the environment in which it has its packages and this checkout, where every user may go."""
    places = {"python": sys.base_prefix, "packages": sysconfig.get_path("purelib"), "checkout": str(ROOT)}
    for name, place in places.items():
        (home / name).mkdir()
        done = subprocess.run(["mount", "--bind", place, str(home / name)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{place} can't be shown to another user: {done.stderr.strip()}")
    python = home / "python" / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(python), {
        "PYTHONPATH": f"{home / 'checkout'}:{home / 'packages'}",
        "LD_LIBRARY_PATH": str(home / "python" / "lib"),  # else it may load the system's libpython of the same name
    }
