"""Training that can't learn stops, and says why: adapters on no layer, a DPO loss that stays at ln 2."""

from pathlib import Path

import pytest

from nemotron_recipes.errors import JobFailed, UserError
from tests.helpers.training import context_for, losses, prepared, worker_file

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "dpo", "dpo")


def run(path: Path) -> None:
    from nemotron_recipes.worker.trl import run as worker

    config, context = context_for(path)
    worker(config, context)


@pytest.mark.parametrize(("lr", "stops"), [(1e-12, True), (1e-3, False)])
def test_a_dpo_loss_that_stays_at_ln_2(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, lr: float, stops: bool
) -> None:
    from nemotron_recipes.worker.trl import learning

    monkeypatch.setattr(learning, "PATIENCE", 3)
    path = worker_file(
        tmp_path / "dpo",
        pairs,
        "dpo",
        train={"train_iters": 5, "global_batch_size": 4, "micro_batch_size": 4},
        optimizer={"lr": lr},
        evaluation={"rows": 0},
    )
    if not stops:
        run(path)
        assert len(losses(tmp_path / "dpo")) == 5
        return
    with pytest.raises(JobFailed, match="ln 2 = 0.6931 for 3 steps"):
        run(path)


def test_adapters_on_layers_that_are_not_there_are_refused(tmp_path: Path, pairs: Path) -> None:
    targets = {"target_modules": ["q_proj", "gate_proj"], "target_parameters": ["mixer.experts.gate_proj"]}
    path = worker_file(tmp_path / "dpo", pairs, "dpo", peft={"dim": 4, "alpha": 4, **targets})
    with pytest.raises(UserError) as refused:
        run(path)
    told = [problem.what for problem in refused.value.problems]
    assert told == ["no layer of this model has gate_proj", "no layer of this model has mixer.experts.gate_proj"]
    assert "in_proj" in refused.value.problems[0].fix
