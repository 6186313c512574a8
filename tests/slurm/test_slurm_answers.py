"""The Slurm that is here, asked about jobs of every kind: the same must be true of it as of the recorded ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import slurm
from tests.helpers.slurm_scenes import record
from tests.helpers.slurm_truth import Truth

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def test_all_that_is_true_of_the_recorded_ones(tmp_path: Path) -> None:
    slurm.require()
    truth = Truth(record(tmp_path))
    for name in sorted(vars(Truth)):
        if name.startswith("check_"):
            getattr(truth, name)()
