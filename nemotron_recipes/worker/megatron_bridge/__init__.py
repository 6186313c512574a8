"""Worker of the megatron_bridge backend. Nothing but what Megatron-Bridge brings is needed."""

from nemotron_recipes.worker.megatron_bridge.stage import run

__all__ = ["run"]
