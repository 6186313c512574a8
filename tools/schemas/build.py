"""Write nemotron_recipes/backends/schemas/*.json from the real packages: `make schemas`, or one of them by its name.

Each version gets a virtual environment of its own below .schemas/, without what needs CUDA; nothing of it is imported
here. megatron-bridge 0.4 and newer need Python 3.12 (PYTHON312=/path/to/python3.12); without one they are left as they
are, and that is said. SHA256SUMS, beside this program, tells whether a file is still what was read from its package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "nemotron_recipes" / "backends" / "schemas"
WORK = ROOT / ".schemas"
HERE = Path(__file__).parent
# Modules that can't be imported without CUDA, or would pull gigabytes for a name in an annotation.
STUBS = (
    "transformer_engine",
    "megatron.energon",
    "megatron.core.inference.contexts.attention_context.triton",
)
# ... and of the newer versions, from Python 3.12 on.
NEWER = (*STUBS, "transformer_engine_torch", "webdataset", "nvidia_resiliency_ext", "diffusers", "modelopt")
NANO, SUPER = "nemotronh.nemotron_3_nano", "nemotronh.nemotron_3_super"
KINDS = ("pretrain", "sft", "peft")
OTHERS = (
    *("torch==2.13.0", "numpy", "packaging", "omegaconf", "hydra-core<1.4", "pyyaml", "rich", "einops", "regex", "six"),
    *("datasets", "tqdm", "typing-extensions", "tensorboard", "wandb", "click", "sentencepiece", "tiktoken"),
    *("accelerate", "psutil", "platformdirs", "pydantic"),
)


@dataclass(frozen=True)
class Bridge:
    """One version of megatron-bridge: what to install for it, and the recipes that are asked for their values."""

    version: str
    core: str
    others: tuple[str, ...]
    stubs: tuple[str, ...]
    recipes: tuple[str, ...]
    python: str = ""  # variable that names the interpreter; "": this one


BRIDGES = {
    "megatron_bridge-0.3.1": Bridge(
        "0.3.1",
        "0.16.1",
        (*OTHERS, "transformers>=4.57,<5"),
        STUBS,
        tuple(f"{NANO}:nemotron_3_nano_{kind}_config" for kind in KINDS),
    ),
}
for version, core in (("0.4.0", "0.17.0"), ("0.5.0", "0.18.0"), ("0.6.2", "0.19.2")):
    named = (f"{NANO}:nemotron_3_nano_{kind}_config" for kind in KINDS)
    larger = (f"{SUPER}:nemotron_3_super_{kind}_config" for kind in KINDS)
    BRIDGES[f"megatron_bridge-{version}"] = Bridge(
        version,
        core,
        (*OTHERS, "transformers==5.12.1"),
        NEWER,
        (*named, *larger, "qwen.qwen3:qwen3_8b_peft_config"),
        python="PYTHON312",
    )

AUTOMODEL = {
    "automodel-0.5.0": ("0.5.0", "d02f49cb314554715aabb97e8dba6599c9f6e9e0"),
}
TORCH, TORCHDATA = "2.13.0", "0.11.0"  # whose callables their sections name
AUTOMODEL_SOURCE = "https://github.com/NVIDIA-NeMo/Automodel"
# The registry's package nemo-rl is empty: its source at a commit is read, with the examples that recipes begin from.
NEMO_RL = {"nemo_rl-0.7.0": ("0.7.0", "81aa43dda4765b0429cf31dab44441e4e4383911")}
NEMO_RL_SOURCE = "https://github.com/NVIDIA-NeMo/RL"
NEMO_RL_BASES = (
    *("examples/configs/dpo.yaml", "examples/configs/grpo_math_1B_megatron.yaml", "examples/nemo_gym/grpo_nanov3.yaml"),
    "examples/configs/recipes/llm/dpo-nanov3-30B3AB-1n8g-fsdp8ep8-automodel.yaml",
    "examples/configs/recipes/llm/grpo-nanov3-30BA3B-2n8g-megatron-pack-cp.yaml",
    "examples/configs/recipes/llm/performance/grpo-nemotron3-super-120BA12B-32n8g.yaml",
    "examples/nemo_gym/nemotron-3-super/stage1_rlvr.yaml",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join([*BRIDGES, *AUTOMODEL, *NEMO_RL])}"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a file is not what it would be"
    )
    parser.add_argument("--automodel", metavar="REPOSITORY", default=AUTOMODEL_SOURCE, help="a clone of NeMo AutoModel")
    parser.add_argument("--nemo-rl", metavar="REPOSITORY", default=NEMO_RL_SOURCE, help="a clone of NeMo-RL")
    parser.add_argument("--venv", metavar="FOLDER", type=Path, help="an environment that has the packages already")
    options = parser.parse_args()
    differs, left = [], []
    for name in options.names or [*BRIDGES, *AUTOMODEL, *NEMO_RL]:
        if name in BRIDGES and not options.venv and not python_for(BRIDGES[name]):
            left.append(name)
            continue
        if name in BRIDGES:
            schema = collect_bridge(name, BRIDGES[name], options.venv)
        elif name in AUTOMODEL:
            schema = collect_automodel(*AUTOMODEL[name], options.automodel)
        elif name in NEMO_RL:
            more = (",".join(NEMO_RL_BASES), str(torch_folder()), f"torch={TORCH}")
            schema = collect_source("collect_nemo_rl.py", *NEMO_RL[name], options.nemo_rl, *more)
        else:
            parser.error(f"unknown schema {name}")
        file, text = TARGET / f"{name}.json", dump(schema)
        if options.check and (not file.is_file() or file.read_text(encoding="utf-8") != text):
            differs.append(name)
        elif not options.check:
            file.write_text(text, encoding="utf-8")
        print(f"{name}: {len(schema['sections'])} sections, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}")
    if left:
        print(f"left as they are, for want of another Python (PYTHON312): {', '.join(left)}", file=sys.stderr)
    if not options.check:
        files = sorted(TARGET.glob("*.json"))
        sums = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
        (HERE / "SHA256SUMS").write_text(sums, encoding="utf-8")
    if differs:
        print(f"differs from what is checked in: {', '.join(differs)}; run `make schemas`", file=sys.stderr)
    return 1 if differs else 0


def collect_bridge(name: str, bridge: Bridge, ready: Path | None) -> dict[str, Any]:
    """The schema of one version, asked of the real package in an environment without CUDA."""
    venv = ready or WORK / name
    if not ready and not (venv / "done").exists():
        subprocess.run([python_for(bridge), "-m", "venv", "--clear", venv], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *bridge.others], check=True)
        exact = [f"megatron-bridge=={bridge.version}", f"megatron-core=={bridge.core}"]
        subprocess.run([*pip, "--no-deps", *exact], check=True)
        (venv / "done").touch()
    collector = [str(venv / "bin" / "python"), str(HERE / "collect_megatron_bridge.py")]
    arguments = [",".join(bridge.stubs), ",".join(bridge.recipes)]
    with tempfile.TemporaryDirectory() as empty:  # recipes put their default folders below the working folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*collector, *arguments], cwd=empty, env=environment, check=True, capture_output=True, text=True
        )
        return json.loads(done.stdout.replace(os.path.realpath(empty), "."))


def python_for(bridge: Bridge) -> str:
    """The interpreter that can install it; "" where nobody has named one."""
    return os.environ.get(bridge.python, "") if bridge.python else sys.executable


def collect_automodel(version: str, commit: str, repository: str) -> dict[str, Any]:
    """The schema of one commit of AutoModel, with what its sections name of PyTorch: read, never imported."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"torchdata=={TORCHDATA}"], check=True)
        packages = f"{torch_folder()},{folder}/torchdata"
        told = (f"torch={TORCH}", f"torchdata={TORCHDATA}")
        return collect_source("collect_automodel.py", version, commit, repository, packages, *told)


def torch_folder() -> Path:
    """Where PyTorch's source lies here; the program ends where that is another version."""
    installed = metadata.version("torch").partition("+")[0]
    if installed != TORCH:
        sys.exit(f"torch {TORCH} is to be read, and {installed} is installed: pip install -c constraints.txt torch")
    return Path(str(metadata.distribution("torch").locate_file("torch")))


def collect_source(script: str, version: str, commit: str, repository: str, *more: str) -> dict[str, Any]:
    """The schema of one commit of a package, read from its source."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", folder]
        subprocess.run(["git", "init", "--quiet", folder], check=True)
        subprocess.run([*git, "fetch", "--quiet", "--depth=1", repository, commit], check=True)
        subprocess.run([*git, "checkout", "--quiet", commit], check=True)
        collector = [sys.executable, str(HERE / script), folder, version, commit, *more]
        return json.loads(subprocess.run(collector, check=True, capture_output=True, text=True).stdout)


def dump(schema: dict[str, Any]) -> str:
    """JSON with one line for each field, so that a diff between versions can be read."""
    lines = ["{"]
    head = {key: value for key, value in sorted(schema.items()) if key not in ("classes", "recipes")}
    lines += [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}," for key, value in head.items()]
    lines.append('"recipes": {')
    recipes = [
        f" {json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in sorted(schema["recipes"].items())
    ]
    lines += [",\n".join(recipes), "},", '"classes": {']
    classes = []
    for name, value in sorted(schema["classes"].items()):
        rest = {key: item for key, item in value.items() if key != "fields"}
        fields = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in value["fields"].items())
        classes.append(f' {json.dumps(name)}: {{{json.dumps(rest, sort_keys=True)[1:-1]}, "fields": {{\n{fields}}}}}')
    return "\n".join([*lines, ",\n".join(classes), "}}"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
