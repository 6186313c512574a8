"""The settings agree with the schema, the backend describes what the worker runs, and both refuse nonsense clearly."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.backends import get_backend
from nemotron_recipes.config import schema
from nemotron_recipes.data import settings as data_settings
from nemotron_recipes.data.packed import PackedSplit
from nemotron_recipes.data.settings import read_settings
from nemotron_recipes.errors import UserError
from nemotron_recipes.planning.resolve import Resolver
from nemotron_recipes.spec import Artifact, Output, StageSpec
from tests.helpers.data_prep import chat, write_rows

ROOT = Path(__file__).parents[2]
SAMPLE = {"path": "sample:largest_of_three", "split": "train", "rows": 20}


def test_the_schema_has_what_is_declared() -> None:
    """Derived field by field: strict types, rules, defaults, closed sections, also inside lists."""
    section = schema.derived(data_settings.Settings)
    assert list(section.model_fields) == [field.name for field in fields(data_settings.Settings)]
    valid = section.model_validate(tree()).model_dump()
    assert read_settings(valid, "sft") == read_settings(tree(), "sft")
    assert valid == asdict(read_settings(tree(), "sft"))


def tree(**changes: Any) -> dict[str, Any]:
    return {"sources": [SAMPLE], "tokenizer": "tiny", **changes}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sft", tree(pack_sise=64), r"unknown key 'data.pack_sise'\n    fix:  did you mean 'pack_size'"),
    ("sft", tree(pack_size="64"), "data.pack_size: '64' is not of type int"),
    ("sft", tree(pack_size=True), "data.pack_size: True is not of type int"),
    ("sft", tree(pack_size=4), "data.pack_size: 4 must be 8 or more"),
    ("sft", tree(overlong="cut"), "data.overlong: 'cut' is not valid"),
    ("sft", tree(sources=[]), "data.sources: .* must have at least 1 element"),
    ("sft", tree(sources={"path": "x"}), "a list is expected"),
    ("sft", tree(sources=["x"]), "data.sources.0: a section is expected"),
    ("sft", tree(sources=[{**SAMPLE, "weight": 0}]), "data.sources.0.weight: 0 must be above 0"),
    ("sft", tree(sources=[{**SAMPLE, "weight": math.inf}]), "data.sources.0.weight: inf must be above 0"),
    ("sft", tree(splits={"train": -1.0}), "data.splits.train: -1.0 must be between 0 and 1"),
    ("sft", tree(sources=[{"rows": 3}]), "data.sources.0.path is missing"),
    ("sft", {"sources": [SAMPLE]}, "data.tokenizer is missing"),
    ("sft", tree(splits={"train": 0.5}), r"train \+ validation \+ test is 0.52, not 1"),
    ("sft", tree(sources=[{**SAMPLE, "split": "test"}]), "no source gives rows to the train split"),
    ("sft", tree(sources=[{"path": "sample:largest_of_three"}]), "how many rows"),
    ("rl", tree(answer_pattern="#### ("), "not a regular expression"),
    ("rl", tree(answer_pattern="#### .+"), "has 0 groups"),
    ("rl", tree(answer_pattern="(a)(b)"), "has 2 groups"),
    ("dpo", tree(answer_pattern="(a)"), "has no meaning for dpo"),
    ("dpo", tree(format="megatron_npy"), "is for sft"),
    ("rl", tree(overlong="truncate"), "data.overlong"),
    ("sft", tree(columns={"chosen": "x"}), "data.columns.chosen has no meaning for sft"),
    ("sft", tree(columns={"messages": "x", "prompt": "y"}), "exclude each other"),
    ("ppo", tree(), "'ppo' is not a method"),
]


_FIELD_WORDS = ("unknown key", "is not of type", "must ", "is not valid", "is expected", "is missing")


@pytest.mark.parametrize("data", [data for _, data, message in REFUSED if any(w in message for w in _FIELD_WORDS)])
def test_the_schema_refuses_what_single_fields_show(data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        schema.DataPrep.model_validate(data)


@pytest.mark.parametrize(("method", "data", "message"), REFUSED)
def test_the_worker_refuses(method: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(data, method)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(UserError) as caught:
        read_settings({"sources": [{"paht": "x"}], "pack_size": 1.5}, "sft")
    assert len(caught.value.problems) == 4  # paht, path, tokenizer, pack_size


def config(method: str, **data: Any) -> dict[str, Any]:
    checked = schema.DataPrepConfig.model_validate(
        {"kind": "data_prep", "method": method, "data": tree(**data), "outputs": {"data": "rows"}}
    )
    return checked.model_dump()


_CROSS_WORDS = ("not 1", "no source", "groups", "no meaning", "is for", "how many", "exclude")
CROSS = [case for case in REFUSED if any(word in case[2] for word in _CROSS_WORDS)]


@pytest.mark.parametrize(("method", "data", "message"), CROSS)
def test_the_backend_refuses_the_same_while_planning(method: str, data: dict[str, Any], message: str) -> None:
    changes = {name: value for name, value in data.items() if name != "tokenizer"}
    problems = get_backend("data_prep").check(config(method, **changes), 1)
    assert len(problems) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(*problems)


def test_the_backend_wants_one_process() -> None:
    backend = get_backend("data_prep")
    assert backend.check(config("sft"), 1) == []
    assert [problem.what for problem in backend.check(config("sft"), 2)] == ["data prep is one process, not 2"]


def launch(tmp_path: Path, method: str, inputs: dict[str, Artifact], **data: Any) -> Path:
    """What the backend describes, written where it says; the path of the worker file."""
    backend = get_backend("data_prep")
    directory = tmp_path / "run $(x) 'é" / "data-prep"
    run = {
        "id": "r1",
        "stage": "data-prep",
        "dir": str(directory),
        "store": str(tmp_path / "store"),
        "fingerprint": "f",
    }
    outputs = (Output("data", "rows", "data"),)
    described = backend.describe(StageSpec(config(method, **data), inputs, outputs, run))
    assert (described.module, described.launcher) == ("nemotron_recipes.worker", "plain")
    for name, text in described.files.items():
        path = directory / "files" / name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    assert described.args == ("--config", str(path))
    return path


def test_no_training_library_is_loaded(tmp_path: Path) -> None:
    file = launch(tmp_path, "sft", {})
    code = (
        "import sys; from nemotron_recipes.worker.runtime import main; code = main(['--config', sys.argv[1]]);"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'hydra'} & set(sys.modules);"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, check=True, timeout=60)


def work(file: Path, expected: int) -> str:
    """Run the worker as a process of its own; what it printed."""
    command = [sys.executable, "-m", "nemotron_recipes.worker", "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    log = max(file.parents[1].glob("logs/attempt-*/rank-0.log")).read_text()
    assert done.returncode == expected, log + done.stderr
    return log


def test_what_the_backend_describes_the_worker_runs(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / 'it\'s "rows".jsonl', [chat(f"{n}?", f"{n}!") for n in range(20)])
    inputs = {
        "data.tokenizer": Artifact("builtin", "tokenizer", "tiny"),
        "data.sources.0.path": Artifact("path", "data", uri=str(rows)),
        "data.sources.1.path": Artifact("builtin", "data", "sample:largest_of_three"),
    }
    sources = [{"path": str(rows), "split": "train", "weight": 1e-05 + 1.0}, SAMPLE]
    file = launch(tmp_path, "sft", inputs, sources=sources, pack_size=128)
    log = work(file, 0)
    made = Store(tmp_path / "store").resolve("rows")
    content = Store(tmp_path / "store").content(made)
    metadata = yaml.safe_load((content / "metadata.json").read_text())
    assert metadata["total"]["rows_written"] == 40
    assert len(PackedSplit(content / "train")) == metadata["splits"]["train"]["packs"]
    assert "40 rows read; 40 written; 0 left out" in log
    record = yaml.safe_load((file.parents[1] / "record.json").read_text())
    assert record["results"]["rows_read"] == 40
    assert not list(file.parents[1].glob("tokenizer-*"))


def test_a_template_is_an_input(tmp_path: Path) -> None:
    """The pinned file is rendered, not what the config's text would find from another folder."""
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    inputs = {
        "data.tokenizer": Artifact("builtin", "tokenizer", "tiny"),
        "data.sources.0.path": Artifact("builtin", "data", "sample:largest_of_three"),
        "data.chat_template": Artifact("path", "template", uri=str(template)),
    }
    file = launch(tmp_path, "kto", inputs, chat_template="mine.jinja")
    assert "2 generation blocks" in work(file, 2)  # it marks user turns as well
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}>{% endif %}{% endfor %}"
    )
    work(file, 0)
    content = Store(tmp_path / "store").content(Store(tmp_path / "store").resolve("rows"))
    assert (content / "chat_template.jinja").read_text() == template.read_text()


def test_the_templates_contents_identify_it(tmp_path: Path) -> None:
    """An edited template is another input, so the stage gets another fingerprint."""
    resolver = Resolver(Store(tmp_path / "store"), tmp_path, makers=lambda name: ())
    assert resolver.resolve("nemotron3", "template") == Artifact("builtin", "template", "nemotron3")
    identities = []
    for text in ("{% generation %}a{% endgeneration %}", "{% generation %}b{% endgeneration %}"):
        (tmp_path / "mine.jinja").write_text(text)
        identities.append(resolver.resolve("mine.jinja", "template").identity)
    assert identities[0] != identities[1]
    with pytest.raises(UserError, match="did you mean 'nemotron3'"):
        resolver.resolve("nemotron", "template")


@pytest.mark.parametrize(("change", "message"), [("dada: {}", "unknown key 'dada'"), ("", "data.tokenizer is missing")])
def test_a_hand_written_file_with_a_typo(tmp_path: Path, change: str, message: str) -> None:
    file = launch(tmp_path, "sft", {})
    text = file.read_text()
    file.write_text(text + change + "\n" if change else text.replace("tokenizer: tiny", ""))
    log = work(file, 2)
    assert message in log
    assert "Traceback" not in log
