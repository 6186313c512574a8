"""The ranks of a conversion: one on the CPU, or several that share out the model, each on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.context import Context

PATIENCE = timedelta(hours=4)  # while one rank fetches the model or writes a file, the others wait for it
_SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
)


@contextmanager
def joined(context: Context) -> Iterator[None]:
    """In a process group of all ranks. After an error a process ends as it is: others may wait in a collective."""
    import torch
    import torch.distributed as dist
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    if context.world_size == 1:
        with temporary_distributed_context(backend="gloo"):
            yield
        return
    from megatron.core import parallel_state

    if torch.cuda.is_available():
        torch.cuda.set_device(context.local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    yield
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def output_of(context: Context, slot: str) -> Path:
    """The folder of this output, which rank 0 makes, on every rank."""
    import torch.distributed as dist

    told = [str(context.output(slot)) if context.is_main else None]
    if context.world_size > 1:
        dist.broadcast_object_list(told)
    return Path(str(told[0]))


def layout_of(parallel: Tree | None, dtype: Any) -> Tree:
    """Fields of a model's provider: how it is shared out, and the type of what is exchanged."""
    sizes = {name: (parallel or {}).get(name, 1) for name in _SIZES}
    return {**sizes, "pipeline_dtype": dtype, "params_dtype": dtype}


def from_all(here: set[str]) -> set[str]:
    """Names that any rank has."""
    import torch.distributed as dist

    found: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, here)
    return set().union(*found)
