"""Backend nemo_rl: DPO and GRPO of NVIDIA NeMo-RL, DPO on DTensor and GRPO on Megatron, both with Ray.

The stage's files are the worker file and nemo_rl.yaml: what differs from one of NeMo-RL's own examples
(`backend.native.base`), from which NeMo-RL's loader begins. The worker starts Ray on the nodes that the launcher gives
it, and there NeMo-RL's program; paths that are known only when the stage runs are added by it.
"""

from __future__ import annotations

from pathlib import Path

from nemotron_recipes.backends import native, nemo_rl_rules, ray_nodes
from nemotron_recipes.backends.layout import Layout
from nemotron_recipes.backends.nemo_rl_native import (
    GYM,
    SCHEMAS,
    TABLES,
    base_of,
    is_gym,
    method_values,
    native_values,
    passes_of,
    schema_of,
)
from nemotron_recipes.backends.workerfile import MODULE, file_path, worker_args, worker_file, yaml_text
from nemotron_recipes.errors import Problem
from nemotron_recipes.rundir import StageDir
from nemotron_recipes.spec import Launch, StageSpec, Tree

FILE, NATIVE_FILE = "train.yaml", "nemo_rl.yaml"
SCRIPTS = {"dpo": "examples/run_dpo.py", "grpo": "examples/run_grpo.py", GYM: "examples/nemo_gym/run_grpo_nemo_gym.py"}
# What the worker and its launch.py import in the Python that Ray's driver runs in. Actors have environments of their
# own, which NeMo-RL makes: whether those are whole shows when it starts them.
IMPORTS = ("torch", "yaml", "ray", "nemo_rl.utils.timer:TimeoutChecker")
_EPOCHS = 1_000_000  # train.train_iters ends the training, unless backend.native gives a number of passes, too


class NemoRlBackend:
    """See `Backend`."""

    name = "nemo_rl"
    kinds = frozenset({"train"})
    methods = frozenset(TABLES)

    def table(self, method: str) -> dict[str, str]:
        return dict(TABLES[method])

    def native_keys(self, method: str) -> frozenset[str]:
        return native.keys(SCHEMAS) | frozenset(TABLES[method].values()) | {"base"}

    def unread(self, method: str) -> dict[str, str]:
        return nemo_rl_rules.unread(method)

    def makes(self, config: Tree) -> str:
        return "checkpoint"

    def check(self, config: Tree, nproc: int) -> list[Problem]:
        return list(nemo_rl_rules.problems(config, Layout.of(config, nproc)))

    def describe(self, stage: StageSpec) -> Launch:
        config = stage.config
        script = SCRIPTS[GYM if is_gym(config) else config["method"]]
        text = worker_file(
            self.name,
            stage,
            method=config["method"],
            script=script,
            base=base_of(config),
            config=str(file_path(stage, NATIVE_FILE)),
            gym=is_gym(config),
            train_iters=config["train"]["train_iters"],
            keep=config["checkpoint"]["keep"],
            ray=ray_nodes.nodes(config["run"].get("nodes", 1)),
            passes=passes_of(config),
            resume_from=stage.resume_from,
        )
        return Launch(
            module=MODULE,
            args=worker_args(stage, FILE),
            files={FILE: text, NATIVE_FILE: yaml_text(native_tree(stage))},
            launcher="torchrun",
            env={"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", **ray_nodes.ENVIRONMENT},
            notes=tuple(note for note in (schema_of(config)[1],) if note),
            writes_together=True,
            imports=(*IMPORTS, *(f"nemo_rl/../{path}" for path in (script, base_of(config)))),
            versions=native.checked_against(schema_of(config)[0]),
        )


def native_tree(stage: StageSpec) -> Tree:
    """What nemo_rl.yaml holds."""
    config, run = stage.config, stage.config["run"]
    folder, method = StageDir(Path(stage.run["dir"])), config["method"]
    given = native.flat(config["backend"]["native"], native.keys(SCHEMAS))
    given.pop("base", None)
    nodes = run.get("nodes", 1)
    values = {
        **method_values(config),
        **native_values(config),
        f"{method}.max_num_epochs": _EPOCHS,
        **given,
        "policy.dtensor_cfg.enabled": method == "dpo",
        "policy.megatron_cfg.enabled": method == "grpo",
        "checkpointing.enabled": True,
        "checkpointing.checkpoint_dir": str(folder.checkpoints),
        "checkpointing.metric_name": None,
        "logger.log_dir": str(folder.path / "nemo_rl"),
        "logger.tensorboard_enabled": True,
        "logger.wandb_enabled": False,  # the worker points it at the stage's W&B run, offline, where there is one
        "cluster.num_nodes": nodes,
        "cluster.gpus_per_node": stage.nproc // nodes,
    }
    return native.nested(values)
