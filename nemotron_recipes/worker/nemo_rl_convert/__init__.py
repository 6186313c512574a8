"""Worker of the nemo_rl_convert backend. Nothing but what NeMo-RL brings is needed."""

from nemotron_recipes.worker.nemo_rl_convert.stage import run

__all__ = ["run"]
