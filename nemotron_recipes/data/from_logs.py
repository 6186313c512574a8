"""Logs -> rows as a whole: read, score (from a field or by judges), choose by thresholds, write, report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_recipes.data import agreement
from nemotron_recipes.data.exchanges import Counts, Exchange, Judged, Limits, read_exchanges, write_rows
from nemotron_recipes.data.gates.simple import number
from nemotron_recipes.data.gates.text import lookup
from nemotron_recipes.data.judges import HIGH, LOW, Ensemble, ask_all, names
from nemotron_recipes.errors import Problem, UserError


@dataclass(frozen=True)
class Request:
    """What to make of which logs. `score_field`: where the score stands; None where `ensemble` judges. `people_field`:
    a person's score on the judges' scale, to calibrate them by."""

    logs: tuple[Path, ...]
    target: str
    out: Path
    limits: Limits
    score_field: str | None = None
    ensemble: Ensemble | None = None
    people_field: str | None = None


def from_logs(request: Request, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Write the rows; returns the report. UserError: an input, or nothing became a row; JobFailed: a judge is silent.
    `out` appears whole, or not at all."""
    verdicts: Iterator[Judged | None] | None = None
    report: dict[str, Any] = {}
    if request.ensemble is not None:
        verdicts, report = _judge(request, request.ensemble, progress)
    counts = Counts()
    exchanges = read_exchanges(request.logs, None if verdicts else request.score_field, counts)
    judged = ((one, next(verdicts)) for one in exchanges) if verdicts else ((one, _field(one)) for one in exchanges)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{request.out.name}.", dir=request.out.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii", newline="\n") as out, tempfile.TemporaryFile() as scratch:
            write_rows(judged, request.target, request.limits, out, scratch, counts)
            out.flush()
            os.fsync(out.fileno())
        if not counts.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.left_out.items()))
            raise UserError(
                Problem(f"nothing became a row; {counts.lines} lines read; left out: {reasons or 'nothing'}")
            )
        os.replace(name, request.out)
    finally:
        if os.path.exists(name):
            os.unlink(name)
    facts = {**asdict(counts), "left_out": dict(sorted(counts.left_out.items()))}
    return {"target": request.target, **facts, "limits": asdict(request.limits), **report}


def _field(exchange: Exchange) -> Judged | None:
    return None if exchange.score is None else Judged(exchange.score)


def _judge(
    request: Request, ensemble: Ensemble, progress: Callable[[int], None]
) -> tuple[Iterator[Judged | None], dict[str, Any]]:
    """A verdict for each exchange in order, and how the judges did. In memory: a number per answer and judge."""
    journal = request.out.with_name(request.out.name + ".judged.jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    replies, people = [], []
    for exchange, scores in ask_all(ensemble, read_exchanges(request.logs, None, Counts()), journal, progress):
        replies.append([np.nan if score is None else score for score in scores])
        said = number(lookup(exchange.fields, request.people_field)) if request.people_field else None
        people.append(np.nan if said is None else said)
    raw = np.array(replies, dtype=float).reshape(-1, len(ensemble.judges))
    truth = np.array(people) if request.people_field else None
    if truth is not None and int((~np.isnan(truth)).sum()) < agreement.LEAST:
        what = f"fewer than {agreement.LEAST} answers have a person's score in '{request.people_field}'"
        raise UserError(Problem(what, fix="name another field, or calibrate the judges by each other"))
    calibrations = agreement.calibrate(raw, truth)
    level = agreement.apply(raw, calibrations)
    report = {"agreement": agreement.figures(names(ensemble), raw, calibrations, truth), "journal": journal.name}
    return _verdicts(raw, level, names(ensemble)), report


def _verdicts(raw: np.ndarray, level: np.ndarray, judges: Sequence[str]) -> Iterator[Judged | None]:
    agreed = agreement.agreement(level, HIGH - LOW)
    for own, calibrated, close in zip(raw, level, agreed.tolist(), strict=True):
        there = ~np.isnan(calibrated)
        if not there.any():
            yield None
            continue
        scores = {name: float(value) for name, value in zip(judges, own, strict=True) if not np.isnan(value)}
        mean = round(float(calibrated[there].mean()), 4)
        yield Judged(mean, scores, None if np.isnan(close) else round(close, 4))
