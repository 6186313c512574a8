"""Worker of the nemo_rl backend. Nothing but what NeMo-RL brings is needed."""

from nemotron_recipes.worker.nemo_rl.stage import run

__all__ = ["run"]
