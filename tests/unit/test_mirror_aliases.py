"""The user's aliases in W&B are those of the store, whoever had them before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.cli.artifacts import artifacts
from nemotron_recipes.mirror.journal import Journal, pending, unmark
from nemotron_recipes.mirror.telling import Teller
from tests.helpers.mirrored import a_run


class FakeApi:
    """What is asked of wandb.Api here: versions of one collection and their aliases, which move."""

    def __init__(self) -> None:
        self.had: dict[str, list[str]] = {"v0": ["latest", "model.v1"], "v1": ["model.v2"]}

    def artifact(self, path: str) -> Any:
        api, number = self, path.rpartition(":")[2]

        class FakeArtifact:
            def __init__(self) -> None:
                self.aliases = list(api.had[number])

            def save(self) -> None:
                api.had = {n: [a for a in old if n == number or a not in self.aliases] for n, old in api.had.items()}
                api.had[number] = self.aliases

        return FakeArtifact()


def test_an_alias_that_moves_back_or_goes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output, api = tmp_path / "nemotron-output", FakeApi()
    for number in (1, 2):
        a_run(output, f"run-{number}").acknowledge(f"output model:v{number}", wandb=f"team/p/Model:v{number - 1}")

    def nemotron(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(artifacts, arguments, standalone_mode=False)
        assert bool(done.exception) is bool(code), done.exception
        return str(done.exception) if done.exception else done.output.strip()

    def best() -> list[str]:
        """Tells W&B what is pending; the versions there that have the alias now."""
        for run in pending(output):
            journal = Journal(output / "runs" / run)
            assert journal.target is not None
            sdk = type("FakeSdk", (), {"Api": lambda timeout: api})
            Teller(sdk, journal.run_dir, journal.target)._tell_aliases()
            unmark(output, run)
        return [number for number, names in api.had.items() if "best" in names]

    assert nemotron("alias", "model:v1", "best") == "model:best is v1" and best() == ["v0"]
    assert nemotron("alias", "model", "best") == "model:best is v2, model:best is no longer v1"
    assert pending(output) == ["run-1", "run-2"] and best() == ["v1"]
    assert nemotron("alias", "model:v1", "best") and best() == ["v0"]
    assert nemotron("alias", "model:v1", "best") == "model:best is v1"
    (output / "store/model/.aliases/best").write_text("damaged")
    assert nemotron("alias", "model:v1", "best") == "model:best is v1", "naming it once more mends it"
    assert nemotron("alias", "model", "best", "--delete") == "model:best is no longer v1" and best() == []
    assert Store(output / "store").aliases("model") == {} and "latest" in api.had["v0"]
    assert "'model' has no alias 'best'" in nemotron("alias", "model", "best", "--delete", code=2)
    assert "there is no such folder" in nemotron("sync", "--output", str(tmp_path / "no"), code=2)
