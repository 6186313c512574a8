"""A panel of judges as a reward: models behind OpenAI-compatible endpoints (data/judges.py) that score each completion.

The file that names them (YAML) has, beside `judges` and `rubric`, what becomes of their scores:

    judges:
      - {name: a, base_url: https://host/v1, model: NAME, api_key_env: A_KEY, weight: 2.0, timeout: 30, tries: 2}
    quorum: 2                  # judges whose score a reward needs; null: all of them
    max_spread: 4.0            # points between the highest and the lowest score that still count as agreement
    on_disagreement: lowest    # or mean, or leave_out
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from nemotron_recipes.data.judges import HIGH, LOW, Client, Ensemble, Judge, question_for, read_ensemble
from nemotron_recipes.data.rules import Positive, Rule
from nemotron_recipes.errors import JobFailed, Problem, UserError

Log = Callable[[str, float], None]


@dataclass(frozen=True)
class WeightedJudge(Judge):
    """`weight`: how much its score counts in the mean."""

    weight: Annotated[float, Rule(gt=0)] = 1.0


@dataclass(frozen=True)
class Panel(Ensemble):
    """See the top of this file."""

    judges: Annotated[list[WeightedJudge], Rule(min_length=1)]  # type: ignore[assignment]
    quorum: Positive | None = None
    max_spread: Annotated[float, Rule(gt=0)] = HIGH - LOW
    on_disagreement: Literal["lowest", "mean", "leave_out"] = "lowest"


def read_panel(path: Path) -> Panel:
    """UserError: the file can't be used, or a key is not in the environment."""
    panel = read_ensemble(path, Panel)
    if panel.quorum is not None and panel.quorum > len(panel.judges):
        what = f"quorum {panel.quorum} is more than there are judges ({len(panel.judges)})"
        raise UserError(Problem(what, str(path), f"quorum: {len(panel.judges)}"))
    return panel


def judged(
    completions: list[Any], prompts: list[Any], *, panel: Panel, log_metric: Log | None = None, **columns: Any
) -> list[float | None]:
    """The judges' weighted mean, 0.0 (useless) to 1.0 (perfect); None, so no reward, where too few gave a score.

    JobFailed: fewer judges than the quorum reply at all, so rewards would no longer mean the same. UserError: one
    refuses.
    """
    with ExitStack() as stack:
        asked = []
        for judge in panel.judges:
            client = Client(judge)
            stack.callback(client.close)
            pool = stack.enter_context(ThreadPoolExecutor(judge.concurrency))
            pairs = zip(prompts, completions, strict=True)
            asked.append([pool.submit(client.score, question_for(panel, p, c)) for p, c in pairs])
        rows = []
        try:
            for of_row in zip(*asked, strict=True):
                rows.append([_reply(reply) for reply in of_row])
                _require_replies(panel, rows[-1])
        finally:  # once the run has to end, nobody is asked about the rest: all tries of all of them take hours
            for reply in (reply for of_judge in asked for reply in of_judge):
                reply.cancel()
    scores = [[None if isinstance(score, JobFailed) else score for score in row] for row in rows]
    if log_metric is not None and scores:
        log_metric("judges/disagreed", sum(_disagree(panel, row) for row in scores) / len(scores))
        log_metric("judges/missing", sum(score is None for row in scores for score in row) / len(scores))
    return [reward(panel, row) for row in scores]


def reward(panel: Panel, scores: Sequence[float | None]) -> float | None:
    """One completion's, from the scores (LOW to HIGH) of all judges in order; None where a judge gave none."""
    given = [(judge.weight, score) for judge, score in zip(panel.judges, scores, strict=True) if score is not None]
    if len(given) < _quorum(panel):
        return None
    value = sum(weight * score for weight, score in given) / sum(weight for weight, _ in given)
    if _disagree(panel, scores) and panel.on_disagreement != "mean":
        if panel.on_disagreement == "leave_out":
            return None
        value = min(score for _, score in given)
    return (value - LOW) / (HIGH - LOW)


def _disagree(panel: Panel, scores: Sequence[float | None]) -> bool:
    given = [score for score in scores if score is not None]
    return bool(given) and max(given) - min(given) > panel.max_spread


def _quorum(panel: Panel) -> int:
    return panel.quorum if panel.quorum is not None else len(panel.judges)


def _reply(asked: Future[float | None]) -> float | JobFailed | None:
    try:
        return asked.result()
    except JobFailed as silent:
        return silent


def _require_replies(panel: Panel, row: Sequence[float | JobFailed | None]) -> None:
    silent = [reply for reply in row if isinstance(reply, JobFailed)]
    if len(row) - len(silent) < _quorum(panel):
        raise JobFailed(f"{_quorum(panel)} judges must reply, and {len(row) - len(silent)} did: {silent[0]}")
