"""Scores of several judges -> one score per answer: each judge put on a common scale, and figures of how they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

LEAST = 5  # answers that a calibration on people's scores needs


@dataclass(frozen=True)
class Calibration:
    """calibrated = slope * raw + intercept."""

    slope: float
    intercept: float


def calibrate(raw: np.ndarray, truth: np.ndarray | None) -> list[Calibration]:
    """One per judge. `raw`: float [answers, judges], NaN where a judge said nothing. `truth`: float [answers], NaN
    where nobody scored; with LEAST answers that a judge scored as well, its line is fitted to them by least squares.
    Without, all judges get the mean and spread of all scores together: who is always two points lower is not worse.
    """
    telling = raw[:, ~constant(raw)]
    pooled = telling[~np.isnan(telling)]
    found = []
    for scores in raw.T:
        there = ~np.isnan(scores)
        both = there & ~np.isnan(truth) if truth is not None else np.zeros(len(scores), dtype=bool)
        if int(both.sum()) >= LEAST and truth is not None and np.ptp(scores[both]) > 0:
            slope, intercept = np.polyfit(scores[both], truth[both], 1)
        elif there.any():
            spread = float(scores[there].std())
            slope = float(pooled.std()) / spread if spread > 0 else 1.0
            intercept = float(pooled.mean()) - slope * float(scores[there].mean())
        else:
            slope, intercept = 1.0, 0.0
        found.append(Calibration(float(slope), float(intercept)))
    return found


def constant(raw: np.ndarray) -> np.ndarray:
    """bool [judges]: who gave one and the same score to all of at least LEAST answers, while another judge did not. It
    tells no answer from another, and would only draw the others' scores together."""
    told = [scores[~np.isnan(scores)] for scores in raw.T]
    same = np.array([len(scores) >= LEAST and np.ptp(scores) == 0 for scores in told], dtype=bool)
    return same & any(len(scores) and np.ptp(scores) > 0 for scores in told)


def apply(raw: np.ndarray, calibrations: Sequence[Calibration]) -> np.ndarray:
    """float [answers, judges], calibrated; NaN also of a judge that is `constant`."""
    slopes = np.array([one.slope for one in calibrations])
    level = raw * slopes + np.array([one.intercept for one in calibrations])
    return np.where(constant(raw), np.nan, level)


def figures(
    names: Sequence[str], raw: np.ndarray, calibrations: Sequence[Calibration], truth: np.ndarray | None
) -> dict[str, Any]:
    """For each judge how often it answered and its calibration, for each pair Spearman's rank correlation and the mean
    difference, and Krippendorff's alpha (interval data) of all; null where there is too little to say."""
    level = apply(raw, calibrations)
    judges = {}
    for place, name in enumerate(names):
        there = ~np.isnan(raw[:, place])
        judges[name] = {"scored": int(there.sum()), "mean": _mean(raw[there, place]), **vars(calibrations[place])}
        judges[name]["constant"] = bool(constant(raw)[place])
        if truth is not None:
            both = there & ~np.isnan(truth) & ~np.isnan(level[:, place])
            judges[name]["people"] = int(both.sum())
            judges[name]["people_spearman"] = spearman(raw[both, place], truth[both])
            judges[name]["people_mean_difference"] = _mean(np.abs(level[both, place] - truth[both]))
    pairs = []
    for one, other in combinations(range(len(names)), 2):
        both = ~np.isnan(level[:, one]) & ~np.isnan(level[:, other])
        difference = _mean(np.abs(level[both, one] - level[both, other]))
        correlation = spearman(raw[both, one], raw[both, other])
        pairs.append({"judges": [names[one], names[other]], "spearman": correlation, "mean_difference": difference})
    return {"judges": judges, "pairs": pairs, "krippendorff_alpha": krippendorff(level)}


def agreement(level: np.ndarray, width: float) -> np.ndarray:
    """float [answers]: 1 - (highest - lowest calibrated score) / `width` of the scale, at least 0; NaN: one judge."""
    there = ~np.isnan(level)
    highest = np.where(there, level, -np.inf).max(axis=1, initial=-np.inf)
    lowest = np.where(there, level, np.inf).min(axis=1, initial=np.inf)
    spoken = there.sum(axis=1) > 1
    result: np.ndarray = np.full(len(level), np.nan)
    result[spoken] = np.clip(1 - (highest - lowest)[spoken] / width, 0, 1)
    return result


def spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Correlation of ranks, ties at their mean rank."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return round(float(np.corrcoef(_ranks(one), _ranks(other))[0, 1]), 4)


def krippendorff(level: np.ndarray) -> float | None:
    """Alpha for interval data (Krippendorff 2011): 1 - observed / expected squared difference."""
    counts = (~np.isnan(level)).sum(axis=1)
    units = level[counts > 1]
    values = units[~np.isnan(units)]
    if len(values) < 3 or np.ptp(values) == 0:
        return None
    sizes = (~np.isnan(units)).sum(axis=1)
    # Sum of squared differences of all ordered pairs: 2 * n * (sum of squares about the mean).
    observed = sum(
        2 * m * np.nansum((unit - np.nanmean(unit)) ** 2) / (m - 1) for unit, m in zip(units, sizes, strict=True)
    )
    expected = 2 * len(values) * float(((values - values.mean()) ** 2).sum()) / (len(values) - 1)
    return round(float(1 - observed / expected), 4)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
