"""Worker of the trl backend: one rank of one SFT, DPO, KTO or GRPO stage.

config.py       the worker file's own keys, strictly read
engine.py       plain Transformers and PEFT, or Unsloth in front of them
fourbit.py      a base in 4 bits
models.py       base model and tokenizer in, Hugging Face folder out
chat.py         rows -> token ids, with the same template and rules as data prep
order.py        the order of the data, a function of the seed alone
packed.py       packs -> batches in which no conversation sees another
trainers.py     TRL's trainers on prepared data
rewards.py      rewards of GRPO
sandbox.py      code of completions in a process of its own (sandbox_child.py is that process, sandbox_walls.py what
                closes it)
panel.py        a panel of judges as a reward
callbacks.py    progress, stopping, checkpoints
checkpoints.py  checkpoint folders that are whole or absent
evaluate.py     held-out measurement
curves.py       loss and learning rate as a picture
"""

from __future__ import annotations

import os

from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.context import Context


def run(config: Tree, context: Context) -> None:
    """Train, measure, write the model. UserError: the worker file or an input can't be used."""
    from nemotron_recipes.worker.trl.config import read_config

    settings = read_config(config)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report each run otherwise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from nemotron_recipes.worker.trl.engine import choose

    engine = choose(settings)
    from nemotron_recipes.worker.trl.stage import run_stage

    run_stage(settings, context, engine)
