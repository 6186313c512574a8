"""The job of a LoRA on a model of 550B parameters, on four nodes of four GB200 each: planned and rendered, whole.

The profile is written as a user writes it, the recipe is the package's; what is compared is all that sbatch and the
nodes would get.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.cli import plan_text
from nemotron_recipes.lifecycle import Prepared
from nemotron_recipes.planning import plan as planning
from nemotron_recipes.spec import Code, Request

GOLDEN = Path(__file__).parents[1] / "golden" / "slurm-gb200-550b-lora.txt"

PROFILE = """\
[artifacts]
output = "/lustre/me/nemotron-output"

[gb200]
executor = "slurm"
account = "YOUR-ACCOUNT"
partition = "batch"
nodes = 4
ntasks_per_node = 4             # one process per GPU; a GB200 node has four
gpus_per_node = 4
segment = 4                     # all four nodes within one NVLink domain
exclusive = true
time = "04:00:00"
max_requeues = 10
container_image = "nvcr.io/nvidia/nemo-automodel:26.04.00"
mounts = ["/lustre:/lustre", "/lustre/me/Automodel:/opt/Automodel"]
hf_cache = "/lustre/hf"
"""


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setattr(planning, "describe_code", lambda: Code("sha256:" + "0" * 64, "0.0.0"))
    monkeypatch.setattr(planning.secrets, "token_hex", lambda size: "1d" * size)
    for name in ("PYTHONPATH", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "env.toml").write_text(PROFILE)
    return prepare(tmp_path)


def prepare(folder: Path) -> Prepared:
    where = {"cwd": str(folder), "offline": True}
    return lifecycle.prepare(Request("ultra3", ("lora",), "gb200", mode="batch", profile="gb200", **where))


def test_golden_job(prepared: Prepared, pytestconfig: pytest.Config) -> None:
    (stage,) = prepared.rendered.stages
    wanted = [path for path in stage.files if path.endswith(("sbatch.sh", "launch.json"))]
    lines = [line for path in sorted(wanted, reverse=True) for line in (f"==> {path}", stage.files[path])]
    lines += ["==> submitted with", *(" ".join(command) for command in prepared.rendered.submit), ""]
    text = "\n".join(lines).replace(prepared.plan.stages[0].fingerprint, "sha256:FINGERPRINT")
    if pytestconfig.getoption("--update-golden"):
        GOLDEN.write_text(text)
    assert GOLDEN.exists(), f"{GOLDEN} is missing: make it with pytest --update-golden"
    assert text == GOLDEN.read_text(), "the job changed; if that is meant: pytest --update-golden, and read the diff"


def test_the_key_of_weights_and_biases_is_optional_and_nowhere(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it and without it the job is the same text; the value travels in a file of its own."""
    monkeypatch.setenv("WANDB_API_KEY", "planted-s3cr3t")
    with_key = prepare(tmp_path)
    assert with_key.rendered == prepared.rendered
    assert "planted-s3cr3t" not in plan_text.describe(with_key)


def test_the_plan_shows_what_is_written_and_what_is_sent(prepared: Prepared) -> None:
    text = plan_text.describe(prepared)
    written, sent = "nvcr.io/nvidia/nemo-automodel:26.04.00", "nvcr.io#nvidia/nemo-automodel:26.04.00"
    assert f"image        {sent}  (written {written})\n" in text
    assert "HF_HOME      /lustre/hf\n" in text
    assert "mount        /lustre/me/Automodel:/opt/Automodel\n" in text
