"""How a run ended, for people and for programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_recipes.artifacts.records import RunView
from nemotron_recipes.artifacts.stages import StageView
from nemotron_recipes.cli.text import duration
from nemotron_recipes.config.tree import flatten
from nemotron_recipes.errors import printable
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import Damaged, RunDir, latest_checkpoint

# result name of a stage's measurement -> how it is told; each has a value before and after training
MEASURES = {"exact_match": "held-out exact match", "preference_accuracy": "held-out preference accuracy"}


def closing(view: RunView) -> str:
    """The last words of a followed run: what was made and learned, or what went wrong and what to do."""
    lines = ["", f"{view.id}: {view.state}"]
    if view.state != "succeeded":
        lines += [view.explanation] if view.explanation else []
        lines += [
            "",
            f"why          nemotron runs explain {view.id}",
            f"look closer  nemotron runs show {view.id}",
            f"logs         nemotron runs logs {view.id}",
        ]
        lines += _continue(view)
        return printable("\n".join(lines))
    lines += ["", "what was made"]
    for stage in view.stages:
        for made in stage.outputs.values():
            reused = "  (reused)" if stage.state == "reused" else ""
            lines.append(f"  {stage.name:<14} {made['name']}:v{made['version']}  {made['uri']}{reused}")
    learned = [line for stage in view.stages for line in _learned(stage)]
    if learned:
        lines += ["", "what was learned", *learned]
    projected = [line for stage in view.stages for line in _projected(view, stage)]
    lines += ["", *projected] if projected else []
    curves = [str(path) for stage in view.stages if (path := curve(view, stage)).exists()]
    if curves:
        lines += ["", "loss curves", *(f"  {path}" for path in curves)]
    return printable("\n".join([*lines, "", *_next(view)]))


def describe(view: RunView, differences: Sequence[str] = ()) -> str:
    """A run in full: its stages, inputs, outputs, results and, where it failed, why.

    differences   sentences on where the sources disagree about it
    """
    lines = [f"{view.id}  {view.state}", f"  command  {view.command}"]
    lines.append(f"  created  {view.created}")
    lines.append(f"  folder   {view.path}")
    lines += _mirrored(view)
    lines += [f"  note     {sentence}" for sentence in differences]
    if view.explanation and not view.stages:
        lines.append(f"  {view.explanation}")
    for stage in view.stages:
        lines += ["", *_stage(view, stage)]
    return printable("\n".join(lines))


def as_tree(view: RunView) -> dict[str, Any]:
    """A run for programs."""
    return {
        "id": view.id,
        "state": view.state,
        "command": view.command,
        "created": view.created,
        "run_dir": view.path,
        "explanation": view.explanation,
        "stages": [
            {
                "name": stage.name,
                "state": stage.state,
                "note": stage.note,
                "attempt": stage.attempt,
                "exit_code": stage.exit_code,
                "started": stage.started,
                "ended": stage.ended,
                "fingerprint": stage.fingerprint,
                "parents": stage.parents,
                "outputs": stage.outputs,
                "results": stage.results,
                "facts": stage.facts,
                "explanation": stage.explanation,
                "log": stage.log,
            }
            for stage in view.stages
        ],
    }


def curve(view: RunView, stage: StageView) -> Path:
    """Where a stage's loss curve lies, if it has one."""
    return RunDir(Path(view.path)).stage(stage.name).curves


def _mirrored(view: RunView) -> list[str]:
    """What W&B knows of the run, where it is mirrored there."""
    journal = Journal(Path(view.path))
    try:
        target = journal.target
        if target is None:
            return []
        count, left, why = len(journal.entries()), len(journal.missing()), journal.last_failure()
        left_out = sorted({key for entry in journal.done().values() for key in entry.get("left_out", ())})
    except Damaged as error:
        return [f"  W&B      {error}"]
    where = f"{target.entity or 'your default entity'}/{target.project}, group {view.id}"
    told = f"all told ({count})" if not left else f"{count - left} of {count} told{f': {why}' if why else ''}"
    lines = [f"  W&B      {where}: {told if count else 'nothing has started yet'}"]
    if left_out:
        lines.append(f"  W&B      not sent, of what the trainer logged: {', '.join(left_out)}")
    return lines


def _stage(view: RunView, stage: StageView) -> list[str]:
    attempt = f", attempt {stage.attempt}" if stage.attempt > 1 else ""
    code = f", exit code {stage.exit_code}" if stage.exit_code else ""
    took = f", {duration((stage.ended or time.time()) - stage.started)}" if stage.started else ""
    lines = [f"{stage.name}: {stage.state}{attempt}{code}{took}", f"  fingerprint {stage.fingerprint}"]
    if stage.note:
        lines.append(f"  note        {stage.note}")
    if stage.explanation:
        lines += [f"  {line}" for line in stage.explanation.splitlines() if line != stage.note]
    planned: dict[str, Any] = next((s for s in view.plan.get("stages", ()) if s["name"] == stage.name), {})
    values = flatten(planned.get("config", {}))
    for key, origin in planned.get("changed", {}).items():
        lines.append(f"  set         {key} = {values.get(key)!r} <- {origin['kind']} {origin['source']}")
    for parent in stage.parents:
        version = f":v{parent['version']}" if parent.get("version") else ""
        lines.append(f"  input       {parent['input']} = {parent.get('name') or parent.get('uri')}{version}")
    for slot, made in stage.outputs.items():
        lines.append(f"  output      {slot} = {made['name']}:v{made['version']}  {made['uri']}")
    for name, words in stage.facts.items():
        lines.append(f"  {name.replace('_', ' '):<12}{words}")
    for name, value in stage.results.items():
        lines.append(f"  result      {name} = {value if isinstance(value, int) or value is None else f'{value:.4g}'}")
    if stage.log:
        lines.append(f"  log         {stage.log}")
    return lines


def _continue(view: RunView) -> list[str]:
    """How to go on after a failure or a stop, where there is something to go on from."""
    lines = []
    if len(view.stages) > 1:
        lines.append("continue     run the same command again: what is done is not done twice")
    for stage in view.stages:
        checkpoint = latest_checkpoint(RunDir(Path(view.path)).stage(stage.name).checkpoints)
        if checkpoint and stage.state in ("failed", "cancelled", "lost"):
            prefix = f"{stage.name}." if len(view.stages) > 1 else ""
            lines.append(f"resume       add {prefix}train.resume=true: from step {int(checkpoint.name[5:])} on")
    return lines


def _learned(stage: StageView) -> list[str]:
    lines = []
    for name, words in MEASURES.items():
        before, after = stage.results.get(f"{name}_before"), stage.results.get(f"{name}_after")
        if before is not None and after is not None:
            lines.append(f"  {stage.name:<14} {words} {before:.1%} -> {after:.1%}")
    return lines


def _projected(view: RunView, stage: StageView) -> list[str]:
    """What a smoke run says of the whole run."""
    from nemotron_recipes.planning.history import pace_of

    if not view.plan.get("request", {}).get("smoke"):
        return []
    pace = pace_of(RunDir(Path(view.path)), stage.name)
    if pace is None:
        return ["how long the whole run takes was not measured: it saved too fast to be seen, or not in one go"]
    measured = (("step", pace.step_seconds), ("save", pace.save_seconds), ("validation", pace.evaluation_seconds))
    told = ", ".join(f"{seconds:.3g} s a {name}" for name, seconds in measured)
    planned = next(planned for planned in view.plan["stages"] if planned["name"] == stage.name)
    place, whole = planned["placement"], planned["stands_for"]
    seconds = pace.whole(whole)
    hours = seconds / 3600 * place["nodes"] * place["nproc_per_node"]
    return [
        f"measured     {told}, {pace.fixed_seconds:.3g} s once",
        f"projected    {whole['steps']} steps, a save every {whole['save_interval']}: {duration(seconds)},"
        f" {hours:.3g} GPU-hours with one GPU a process",
    ]


def _next(view: RunView) -> list[str]:
    models = [made for stage in view.stages for slot, made in stage.outputs.items() if slot == "model"]
    made = (models or [m for stage in view.stages for m in stage.outputs.values()] or [None])[-1]
    if made is None:
        return []
    lines = [f"lineage      nemotron lineage {made['name']}:v{made['version']}"]
    lines += [f"this run     nemotron runs show {view.id}"]
    if models:
        family = view.plan["family"]
        lines += ["", "what to try next"]
        if len(view.stages) > 1:
            lines += [f"  nemotron {view.title} --dry-run                 what is reused now"]
        lines += [f"  nemotron {family} sft -c tiny train.train_iters=100      any value overridden"]
        lines += [
            f"  nemotron {family} data prep sft -c default 'data.sources=[{{path: my.jsonl}}]' data.tokenizer=tiny"
        ]
    return lines
