"""What happens around the steps: progress, a wish to stop, checkpoints."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from nemotron_recipes.pulse import Phase
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.deadline import Pace
from nemotron_recipes.worker.metrics import forget_after
from nemotron_recipes.worker.trl.checkpoints import commit_checkpoint

_BAR = 24  # characters
# Trainer's words -> ours
_NAMES = {"learning_rate": "lr", "eval_loss": "validation_loss"}
_TIME_LIMIT, _SIGNAL = 1.0, 2.0  # why a rank wants to stop; the larger one wins among them
_LEFT_OUT = ("epoch", "num_tokens", "total_flos", "step_time")


class Progress(TrainerCallback):
    """Rank 0: a line in metrics.jsonl and one for people at each logged step."""

    def __init__(self, context: Context, start: int):
        self.context = context
        self.start = start
        if context.is_main:
            forget_after(context.dir.metrics, start)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.last = time.monotonic()
        self.last_step = state.global_step
        self.last_tokens: float | None = None  # of all ranks since the start, as TRL counts them

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not self.context.is_main or not ("loss" in logs or "eval_loss" in logs):
            return
        line = {"step": state.global_step, "steps": state.max_steps, "time": round(time.time(), 3)}
        numbers = {_NAMES.get(name, name): value for name, value in logs.items() if name not in _LEFT_OUT}
        line |= {name: _finite(value) for name, value in numbers.items() if isinstance(value, (int, float))}
        if "loss" in logs:
            now = time.monotonic()
            line["seconds_per_step"] = round((now - self.last) / max(1, state.global_step - self.last_step), 4)
            if (tokens := logs.get("num_tokens")) is not None:
                if self.last_tokens is not None and now > self.last:
                    line["tokens_per_second"] = round((tokens - self.last_tokens) / (now - self.last), 1)
                self.last_tokens = tokens
            line["memory_bytes"] = _peak_memory()
            self.last, self.last_step = now, state.global_step
            self.context.results["loss"] = logs["loss"]
            print(_progress_line(line, (now - self.began) / (state.global_step - self.start)), flush=True)
        else:
            self.context.results["validation_loss"] = logs["eval_loss"]
            print(f"step {line['step']}/{line['steps']} validation loss {logs['eval_loss']:.4f}", flush=True)
        with open(self.context.dir.metrics, "a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")


class WhereItIs(TrainerCallback):
    """Every rank's heartbeat. Added last: what the others want to be done after a step is known then."""

    def __init__(self, context: Context):
        self.context = context

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.at("loading", state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.at("training", state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase: Phase = "saving" if control.should_save else "loading"
        self.context.at("evaluating" if control.should_evaluate else phase, state.global_step, state.max_steps)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.at("evaluating", state.global_step, state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.at("saving" if control.should_save else "loading", state.global_step, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.at("loading", state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.at("ending", state.global_step, state.max_steps)


class StopWhenAsked(TrainerCallback):
    """Save and end after the step in which any rank was asked to stop, or after which no other one fits in the time."""

    def __init__(self, context: Context, pace: Pace):
        self.context = context
        self.pace = pace

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.began(time.time())
        self.context.stop_requested()  # from now on a signal waits for the end of the step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        now = time.time()
        self.pace.step_done(now)
        # After the last step only the end of the stage is left: there is nothing that another attempt could go on with.
        time_is_up = state.global_step < state.max_steps and self.pace.must_stop(now)
        wish = _SIGNAL if self.context.stop_requested() else _TIME_LIMIT if time_is_up else 0.0
        if self.context.world_size > 1:
            flag = torch.tensor([wish], device=args.device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            wish = flag.item()
        if wish:
            self.context.stop_seen = True
            self.context.time_is_up = wish == _TIME_LIMIT
            control.should_save = control.should_training_stop = True
            reason = "time-limit" if self.context.time_is_up else "signal"
            self.context.event("stopped", step=state.global_step, reason=reason)
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.evaluated(time.time())


class SaveWhole(TrainerCallback):
    """Turn what the trainer has staged into a checkpoint; nothing half-written ever carries a valid name."""

    def __init__(self, context: Context, keep: int, pace: Pace):
        self.context = context
        self.keep = keep
        self.pace = pace

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.context.world_size > 1:
            distributed.barrier()  # every rank has written its random state
        if self.context.is_main:
            folder = commit_checkpoint(self.context.dir.checkpoints, state.global_step, self.keep)
        seconds = round(self.pace.saved(time.time()), 3)
        if self.context.is_main:
            self.context.event("checkpoint-saved", step=state.global_step, checkpoint=str(folder), seconds=seconds)


def _progress_line(line: dict[str, Any], seconds: float) -> str:
    """`step 12/50 [#####---...] loss 1.2345 lr 5.0e-03 0.11 s/step, 0:00:04 left`"""
    done, steps = line["step"], line["steps"]
    filled = _BAR * done // steps
    left = timedelta(seconds=round((steps - done) * seconds))
    width = len(str(steps))
    loss = "nan" if line["loss"] is None else f"{line['loss']:.4f}"
    reward = f" reward {line['reward']:.3f}" if line.get("reward") is not None else ""
    return (
        f"step {done:{width}}/{steps} [{'#' * filled}{'-' * (_BAR - filled)}] loss {loss}{reward}"
        f" lr {line['lr']:.1e} {seconds:.2f} s/step, {left} left"
    )


def _peak_memory() -> int:
    """Of this rank since it started: GPU memory that torch allocated, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _finite(value: float) -> float | None:
    """JSON has no NaN: such a value is kept by name, as null."""
    return value if math.isfinite(value) else None
