"""Find what `train.resume=true` continues."""

from __future__ import annotations

from pathlib import Path

from nemotron_recipes.rundir import RunDir, latest_checkpoint, read_json


def find_resumable(runs: Path, fingerprint: str) -> Path | None:
    """Newest whole checkpoint of the newest run of a stage with this fingerprint that did not succeed."""
    plans = list(runs.glob("*/plan.json")) if runs.is_dir() else []
    for plan_file in sorted(plans, key=lambda p: p.stat().st_mtime, reverse=True):
        plan = read_json(plan_file) or {}
        for stage in plan.get("stages", ()):
            if stage["fingerprint"] != fingerprint:
                continue
            folder = RunDir(plan_file.parent).stage(stage["name"])
            if (read_json(folder.record) or {}).get("state") == "succeeded":
                continue
            checkpoint = latest_checkpoint(folder.checkpoints)
            if checkpoint:
                return checkpoint
    return None
