"""Worker of the megatron_convert backend. Nothing but what Megatron-Bridge brings is needed."""

from nemotron_recipes.worker.megatron_convert.stage import run

__all__ = ["run"]
