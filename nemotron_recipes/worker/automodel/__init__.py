"""Worker of the automodel backend. Nothing but what NeMo AutoModel brings is needed."""

from nemotron_recipes.worker.automodel.stage import run

__all__ = ["run"]
