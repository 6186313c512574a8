"""What every Slurm from 20.11 on has really answered to our questions, and what our code makes of it.

tests/recorded/slurm-*/answers.json: one cluster of each, with jobs of every kind (tests/helpers/slurm_scenes.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.helpers.slurm_truth")
from tests.helpers.slurm_answers import Recording  # noqa: E402
from tests.helpers.slurm_truth import Truth  # noqa: E402

RECORDED = {path.parent.name: path for path in (Path(__file__).parents[1] / "recorded").glob("slurm-*/answers.json")}
TRUTHS = {name: Truth(Recording.load(path)) for name, path in sorted(RECORDED.items())}
CHECKS = sorted(name for name in vars(Truth) if name.startswith("check_"))


def test_old_and_new_ones_are_among_them() -> None:
    assert {*TRUTHS} >= {"slurm-20.11", "slurm-22.05", "slurm-24.11", "slurm-25.11", "slurm-26.05"}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("series", [*TRUTHS])
def test_of(series: str, check: str) -> None:
    getattr(TRUTHS[series], check)()
