"""The trl worker's own keys are read strictly: every mistake has its name and its fix."""

import pytest

from nemotron_recipes.errors import UserError
from nemotron_recipes.worker.trl.config import read_config

GOOD = {"method": "sft", "trainer": {"max_steps": 1}}


def test_defaults():
    settings = read_config(GOOD)
    assert settings.peft is None and settings.model.dtype == "bfloat16" and settings.resume_from is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methd": "sft"}, "did you mean 'method'"),
        ({"method": "sftt"}, "did you mean 'sft'"),
        ({"method": 3}, "method: 3 is not of type str"),
        ({"trainer": 3}, "trainer: 3 is not of type"),
        ({"peft": {"dim": "8", "alpha": 8, "target_modules": []}}, "peft.dim: '8' is not of type int"),
        ({"peft": {"alpha": 8, "target_modules": []}}, "peft.dim is missing"),
        ({"evaluation": {"row": 3}}, "did you mean 'rows'"),
        ({"evaluation": {"rows": True}}, "evaluation.rows: True is not of type int"),
        ({"resume_from": 3}, "resume_from: 3 is not of type str"),
        ({"method": "grpo", "rewards": []}, "grpo needs at least one"),
        ({"rewards": ["a", 1]}, "rewards"),
        ({"model": None}, "model: a section is expected"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(UserError, match=message):
        read_config({**GOOD, **change})


def test_all_mistakes_at_once():
    with pytest.raises(UserError) as error:
        read_config({"method": "sft", "trainr": {}, "evaluation": {"row": 1}})
    assert len(error.value.problems) == 3  # two unknown keys, one missing
